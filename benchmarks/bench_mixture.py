"""Gaussian mixtures of whole posteriors, and scikit-learn's of one draw of each: time and density.

python benchmarks/bench_mixture.py [RUN] [--components N ...] [--seed S]

RUN is a run directory with a flat VAE, `models/mnist-mlp` by default; the codes are those of its
training images. Both fits have full covariances, one start by k-means and a tolerance of 1e-3 nats.
What they win over N(0, I), E_q[log mixture - log p], is of the validation images, one draw of each.
Times are the processor's, because other work on a machine stretches wall time.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from ncprior.normal import StandardNormal
from ncprior.numerics import mean_and_se, stream
from ncprior.priors import GaussianMixture
from ncprior.runs import Run
from ncprior.training.bases import codes_of


def of_draws(draws: Tensor, components: int, seed: int) -> GaussianMixture:
    """scikit-learn's mixture of points (n, d)."""
    from sklearn.mixture import GaussianMixture as Mixture

    found = Mixture(components, max_iter=2000, random_state=seed).fit(draws.numpy())
    weights, means, covariances = map(
        torch.from_numpy, (found.weights_, found.means_, found.covariances_)
    )
    mixture = GaussianMixture(components, draws.shape[1])
    mixture.set(weights.log(), means, torch.linalg.cholesky(covariances.double()))
    return mixture


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path, nargs="?", default=Path("models/mnist-mlp"))
    parser.add_argument("--components", type=int, nargs="+", default=[10, 30, 100])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run = Run.open(asked.run)
    vae, (data, splits) = run.load_vae(), run.load_data()
    codes, held = (
        codes_of(vae, data, rows, generator=stream(0, "codes"))
        for rows in (splits.train, splits.validation)
    )
    draws = codes.each(generator=stream(asked.seed, "draws"))
    z = held.each(generator=stream(asked.seed, "held-out draws"))
    normal = StandardNormal(codes.latent_size).log_prob(z)
    print(f"{len(draws):,} codes of {codes.latent_size} latents, {len(z):,} held out")
    print("components  fit                    nats won on held-out images   processor time (s)")
    for components in asked.components:
        fits = {
            "ours, posteriors": lambda: GaussianMixture.fit(codes, components, seed=asked.seed),
            "scikit-learn, draws": lambda: of_draws(draws, components, asked.seed),
        }
        times = {}
        for name, fit in fits.items():
            began = time.process_time()
            mixture = fit()
            times[name] = time.process_time() - began
            won = mean_and_se(mixture.log_prob(z) - normal)
            print(f"{components:10}  {name:22} {won.value:6.3f} +- {won.se:.3f}"
                  f"{times[name]:27.1f}", flush=True)  # fmt: skip
        ours, theirs = times.values()
        print(f"{'':12}ours is {theirs / ours:.1f} times as fast", flush=True)


if __name__ == "__main__":
    main()
