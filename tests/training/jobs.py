"""Two small training jobs, the same in the test process and in one that is killed.

Run as a script it trains in a directory and kills itself at a step:
    python jobs.py {vae,ncp} {digits,binary} DIRECTORY STEP
"""

import os
import signal
import sys
from pathlib import Path

import torch
from toys import interrupt_at

import ncprior

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}


def small_vae(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ncprior.build_vae((1, 8, 8), latent_size=3, hidden=(16,), likelihood="bernoulli")


def train(data, splits, *, hook=None, **options):
    """Stage 1 for 40 steps; `hook` is (walk, action). Returns weights and history."""
    vae = small_vae()
    if hook:
        interrupt_at(vae, *hook)
    options = {"steps": 40, "batch_size": 32, "evaluate_every": 8, "checkpoint_every": 10} | options
    history = ncprior.train_vae(vae, data, splits, **QUIET, **options)
    return vae.state_dict(), history


def fit(data, splits, *, hook=None, **options):
    """Stage 2 for 40 steps on a VAE as it came; returns weights and what was found."""
    vae = small_vae()
    if hook:
        walk, action = hook
        interrupt_at(vae, walk + 1, action)  # the first one is that of `check_vae`
    options = {
        "steps": 40,
        "batch_size": 16,
        "evaluate_every": 8,
        "checkpoint_every": 10,
        "network_options": {"width": 8, "members": 2},
        "refresh_passes": 0.1,
        "log_z_draws": 1000,
    } | options
    prior = ncprior.fit_prior(vae, data, rows=splits.train, **QUIET, **options)
    return prior.state_dict(), (prior.record, prior.log_z)


STAGES = {"vae": train, "ncp": fit}

if __name__ == "__main__":
    stage, kind, directory, step = sys.argv[1:]
    data, splits = ncprior.load_data("digits", binarize="dynamic" if kind == "binary" else None)
    hook = (int(step), lambda: os.kill(os.getpid(), signal.SIGKILL))
    STAGES[stage](data, splits, directory=Path(directory), hook=hook)
