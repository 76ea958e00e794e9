"""Priors that can be trained with the VAE: that way, against a fit to the finished VAE.

python benchmarks/bench_joint.py [--recipe RECIPE] [--only vamp lars snis ebm] [--seed S]

The same networks, steps and data in every row. "after" is a prior fitted to the VAE that was
trained under N(0, I); "together" a VAE trained under that prior from the start, as published.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import ncprior
from ncprior.numerics import stream, stream_seed
from ncprior.priors import PRIORS, PseudoInputs, fit_density
from ncprior.recipes import load_recipe
from ncprior.sources import training_images
from ncprior.training.bases import codes_of

NAMES = ("vamp", "lars", "snis", "ebm")
SAMPLES, IMAGES, IMPORTANCE = 5000, 1000, 200
COLUMNS = ("NLL (nats)", "FD", "FD of reconstructions", "time (s)")


def fresh(section: dict[str, Any], data: Any, splits: Any, seed: int) -> Any:
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(seed, "vae weights"))
        mean = data.raw(splits.train[:20_000]).mean(0)
        return ncprior.build_vae(data.image_shape, image_mean=mean, **section)


def trained_together(name: str, vae: Any, data: Any, splits: Any, train: Any, seed: int) -> Any:
    """The VAE with a prior of that name that it was trained under."""
    if name == "vamp":
        images = training_images(data, splits, seed)
        vae.prior = PseudoInputs(vae.encode, images, seed=seed)
    elif name != "gaussian":
        with torch.random.fork_rng([]):
            torch.manual_seed(stream_seed(seed, "prior weights"))
            vae.prior = PRIORS[name](vae.latent_size)
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(seed, "draws of the prior"))
        ncprior.train_vae(vae, data, splits, seed=seed, progress=False, **train)
    vae.eval()
    if name == "vamp":
        return vae.with_prior(vae.prior.frozen())
    if name == "lars":
        vae.prior.estimate_acceptance(generator=stream(seed, "acceptance"))
    return vae


def measured(vae: Any, data: Any, splits: Any, seed: int, dense: bool) -> list[str]:
    """NLL, and Frechet distances of samples and of reconstructions."""
    scores = ncprior.evaluate(
        vae, None, data, splits, metrics=["nll", "fd"] if dense else ["fd"], samples=SAMPLES,
        images=IMAGES, importance_samples=IMPORTANCE, features="mnist", seed=seed,
    )  # fmt: skip
    names = ("nll_base", "fd_base", "fd_reconstruction")
    return [f"{scores[n].text()} {scores[n].error()}" if n in scores else "" for n in names]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipe", type=Path, default=Path("recipes/priors-mlp.toml"))
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    recipe, seed = load_recipe(asked.recipe), asked.seed
    data, splits = ncprior.load_data(**recipe["data"])
    print(f"{asked.recipe}, seed {seed}, {SAMPLES:,} samples, NLL of {IMAGES:,} images with "
          f"{IMPORTANCE} importance samples\n")  # fmt: skip
    print("| prior | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1), flush=True)

    def row(title: str, vae: Any, seconds: float, dense: bool) -> None:
        cells = [*measured(vae, data, splits, seed, dense), f"{seconds:.0f}"]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)

    def together(name: str) -> tuple[Any, float]:
        began = time.process_time()
        vae = fresh(recipe["vae"], data, splits, seed)
        found = trained_together(name, vae, data, splits, recipe["train"], seed)
        return found, time.process_time() - began

    plain, seconds = together("gaussian")
    row("N(0, I)", plain, seconds, True)
    codes = codes_of(plain, data, splits.train, generator=stream(seed, "codes"))
    starts = training_images(data, splits, seed)
    for name in asked.only:
        began = time.process_time()
        prior = fit_density(name, codes, vae=plain, images=starts, seed=seed)
        after = time.process_time() - began
        row(f"{name}, after", plain.with_prior(prior), seconds + after, name != "ebm")
        row(f"{name}, together", *together(name), name != "ebm")


if __name__ == "__main__":
    main()
