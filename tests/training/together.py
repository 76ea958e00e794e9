"""A training run that is the same in one process and in two, each with half of every batch.

Run by torchrun it trains into a directory, where each process leaves what it has come to:
    torchrun --nproc-per-node 2 together.py DIRECTORY
"""

import math
import os
import sys
from pathlib import Path

import torch
from torch import nn

import ncprior
from ncprior.normal import Normal
from ncprior.vaes.likelihoods import GaussianEmission
from ncprior.walk import Group

IMAGES = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0))
SPLITS = ncprior.Splits(torch.arange(30), torch.arange(30, 37), torch.arange(37, 40))


class MeanNormal(Normal):
    """Its draws are its mean, so that no noise tells processes apart."""

    def rsample(self, sample_shape=(), *, generator=None):
        return self.loc


class ConvVAE(nn.Module):
    """Two groups of latents (2, 2, 2), convolutions with batch norms, float64."""

    num_groups = 2

    def __init__(self, nan_at=None):
        super().__init__()
        self.nan_at, self.seen = nan_at, 0
        layers = lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.BatchNorm2d(3), nn.ELU(), nn.Conv2d(3, 4, 1)
        )
        self.encoders = nn.ModuleList([layers(), layers()])
        self.decoder = nn.Sequential(
            nn.BatchNorm2d(4, momentum=None), nn.Conv2d(4, 4, 1), nn.PixelShuffle(2)
        )
        self.double()

    def encode(self, images):
        return tuple(encoder(images.double()) for encoder in self.encoders)

    def start(self, num):
        return []

    def group(self, state, evidence=None):
        posterior = None
        if evidence is not None:
            loc, log_scale = evidence[len(state)].chunk(2, 1)
            posterior = MeanNormal(loc, log_scale.exp(), event_dim=3)
        zero = torch.zeros(len(evidence[0]), 2, 2, 2, dtype=torch.float64)
        return Group(Normal(zero, zero + 1, event_dim=3), posterior, None)

    def advance(self, state, z):
        return [*state, z]

    def emit(self, state):
        means = self.decoder(torch.cat(state, 1))
        self.seen += self.training
        if self.training and self.seen == self.nan_at:
            means = means * math.nan
        return GaussianEmission(means, torch.tensor(0.5, dtype=torch.float64))


def train(directory=None, nan_at=None, **options):
    """Weights and running statistics, and the history; the loss is NaN at step `nan_at` once."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = ConvVAE(nan_at)
    options = {
        "steps": 6,
        "batch_size": 10,
        "learning_rate": 0.01,
        "eps": 1e-3,  # lest Adam blow up the rounding errors of gradients that are 0
        "kl_warmup": 0.5,
        "kl_balance": True,
        "norm_penalty": 0.1,
        "evaluate_every": 3,
        "checkpoint_every": 4,
    } | options
    quiet = {"tensorboard": False, "progress": False, "device": "cpu"}
    history = ncprior.train_vae(vae, IMAGES, SPLITS, directory=directory, **options, **quiet)
    assert not any(type(part).__name__ == "SyncedBatchNorm2d" for part in vae.modules())
    return vae.state_dict(), history


if __name__ == "__main__":
    directory, rank = Path(sys.argv[1]), os.environ["RANK"]
    plain = train(directory)
    recovered = train(nan_at=6 if rank == "1" else None)
    torch.save({"plain": plain, "recovered": recovered}, directory / f"process-{rank}.pt")
