"""Which prior, over data, networks, latent sizes and likelihoods: sixteen VAEs, all priors on each.

python benchmarks/bench_priors.py [--seeds 3] [--out runs/priors] [--only NAME ...]

MNIST and Fashion-MNIST, an MLP and a convolutional network (recipes/priors-mlp.toml and
priors-conv.toml), 16 and 64 latents, Bernoulli and Gaussian likelihood. Each VAE is trained once
(seed 0); the seeds are of fits and draws. What is there already is taken up, so that the script can
be stopped at any point; it ends with tables over all VAEs that are there.
"""

import argparse
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from ncprior.feature_training import train_feature_directory
from ncprior.pipeline import compare_run, train_run
from ncprior.priors import PRIORS
from ncprior.recipes import load_recipe
from ncprior.scoreboard import Comparison, load_comparison

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
NAMES = ["-".join(parts) for parts in product(
    ("mnist", "fashion"), ("mlp", "conv"), ("16", "64"), ("bernoulli", "gaussian")
)]  # fmt: skip
COMPARED = [
    *PRIORS, "ncp", "ncp-mixture", "mixture-auto", "ncp-mixture-auto", "ncp+ncp-mixture-auto",
]  # fmt: skip
PAIRS = [
    ("ncp-mixture-auto", "mixture-auto"), ("ncp-mixture-auto", "ncp"),
    ("ncp-mixture-auto", "ncp-mixture"), ("ncp+ncp-mixture-auto", "ncp-mixture-auto"),
]  # fmt: skip
"""Priors whose difference is shown, seed by seed."""
SAMPLES, IMAGES = 2000, 500


def recipe(name: str) -> dict[str, Any]:
    """One of the two recipes, changed to what the name says."""
    data, network, latents, likelihood = name.split("-")
    found = load_recipe(RECIPES / f"priors-{network}.toml")
    found["data"]["path"] = {"mnist": "mnist", "fashion": "fashion_mnist"}[data]
    found["vae"]["latent_size"] = int(latents)
    if likelihood == "gaussian":
        found["data"].pop("binarize", None)
        found["vae"] |= {"likelihood": "gaussian", "likelihood_scale": 0.2}
    return found


def features(name: str, out: Path) -> Any:
    """The classifier that comes with the package, or one that is trained first."""
    if name.startswith("mnist"):
        return "mnist"
    where = out / "fashion-features"
    if not (where / "config.json").exists():
        train_feature_directory("fashion_mnist", where, epochs=3)
    return where


def measure(name: str, out: Path, seeds: int, priors: list[str]) -> None:
    run = train_run(recipe(name), out / name, resume=(out / name / "config.toml").exists())
    compare_run(
        run, priors=priors, seeds=seeds, samples=SAMPLES, images=IMAGES,
        features=features(name, out), resume=True,
    )  # fmt: skip


def gained(found: Comparison, column: str) -> dict[str, dict[int, float]]:
    """Values by prior and seed; of the NLL what is won over the Gaussian with that seed."""
    values: dict[str, dict[int, float]] = {}
    for score in found.scores:
        if column in score.values:
            values.setdefault(score.prior, {})[score.seed] = score.values[column]
    if column == "nll":
        of_gaussian = values["gaussian"]
        values = {prior: {seed: of_gaussian[seed] - nll for seed, nll in of.items()}
                  for prior, of in values.items()}  # fmt: skip
    return values


def differences(values: dict[str, dict[int, float]], first: str, second: str) -> list[float]:
    """By how much the first prior is ahead, with each seed that both have."""
    ours, theirs = values.get(first, {}), values.get(second, {})
    return [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]


def with_error(values: list[float]) -> str:
    """The mean, with its standard error over seeds where there are several."""
    if not values:
        return ""
    if len(values) < 2 or len(set(values)) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def overview(out: Path) -> str:
    """Gap closed and NLL gained over the Gaussian by VAE and prior, and pairs of them; Markdown."""
    known = {name: load_comparison(out / name / "compare") for name in NAMES
             if (out / name / "compare" / "comparison.json").exists()}  # fmt: skip
    priors = list(dict.fromkeys(s.prior for found in known.values() for s in found.scores))
    tables = []
    for title, column in (("gap closed", "gap_closed"), ("NLL gain, nats", "nll")):
        rows, paired = [[title, "seeds", *priors]], [[title, *map(" over ".join, PAIRS)]]
        for name, found in known.items():
            values = gained(found, column)
            mean = {prior: statistics.mean(of.values()) for prior, of in values.items()}
            best = max(mean, key=mean.__getitem__)
            cells = [with_error([*values.get(prior, {}).values()]) for prior in priors]
            marked = [f"**{c}**" if p == best else c for p, c in zip(priors, cells, strict=True)]
            rows.append([name, str(len(values["gaussian"])), *marked])
            paired.append([name, *(with_error(differences(values, *pair)) for pair in PAIRS)])
        tables += [markdown([*zip(*rows, strict=True)]), markdown([*zip(*paired, strict=True)])]
    return "\n\n".join(tables)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    lined = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in lined)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/priors"))
    parser.add_argument("--priors", nargs="*", default=COMPARED)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    asked = parser.parse_args()
    for name in asked.only:
        measure(name, asked.out, asked.seeds, list(dict.fromkeys(["gaussian", *asked.priors])))
        print(f"{name}\n{load_comparison(asked.out / name / 'compare')}", flush=True)
    print(overview(asked.out))


if __name__ == "__main__":
    main()
