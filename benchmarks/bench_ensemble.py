"""How many members an ensemble of ratios should have, with and without calibration.

python benchmarks/bench_ensemble.py [SEEDS] [MEMBERS ...]

The demo's VAE of each seed (digits), on it the small network with 1, 4 and 16 members. A row's
two ways have the same weights; without calibration the temperature is 1 and the shift 0. All
figures are of test images, on which nothing was fitted, as means over the seeds.
"""

import copy
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import show

import ncprior
from ncprior.latent_figures import jsd_on_test_images, log_ratios_on_test_images
from ncprior.metrics.calibration import reliability
from ncprior.pipeline import DEMO, train_run
from ncprior.training.presets import PRESETS

SAMPLES = 2000
COLUMNS = {
    "gap_closed": "gap closed",
    "nll_gain": "NLL gain",
    "jsd_test": "JSD",
    "nll_log_z": "log Z",
    "off": "log r off by",
    "seconds": "fit, s",
}


def uncalibrated(prior: Any) -> Any:
    other = copy.deepcopy(prior)
    for ratio in other.ratios:
        ratio.temperature.fill_(1)
        ratio.shift.fill_(0)
    return other


def measured(vae: Any, prior: Any, data: Any, splits: Any, seed: int) -> dict[str, float]:
    scores = ncprior.evaluate(
        vae, prior, data, splits, metrics=["fd", "nll"], samples=SAMPLES, images=300,
        importance_samples=200, log_z_draws=200_000, seed=seed,
    )  # fmt: skip
    found = {name: figure.value for name, figure in scores.items()}
    found["jsd_test"] = jsd_on_test_images(vae, prior, data, splits, seed=seed).value
    draws = log_ratios_on_test_images(vae, prior, data, splits, seed=seed)
    return found | {"off": reliability(*draws, bins=10).error}


def main() -> None:
    seeds, *sizes = [int(v) for v in sys.argv[1:]] or [3]
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in range(seeds):
        recipe = {name: dict(section) for name, section in DEMO.items()}
        recipe["data"]["seed"] = recipe["train"]["seed"] = seed
        with tempfile.TemporaryDirectory() as place:
            run = train_run(recipe, Path(place) / "run", progress=False)
            vae, (data, splits) = run.load_vae(), run.load_data()
        for members in sizes or (1, 4, 16):
            began = time.perf_counter()
            prior = ncprior.fit_prior(
                vae, data, rows=splits.train, seed=seed, preset="small", progress=False,
                match_moments=False,
                network_options=PRESETS["small"]["network_options"] | {"members": members},
            )  # fmt: skip
            seconds = {"seconds": time.perf_counter() - began}
            for way, own in (("calibrated", prior), ("as it is", uncalibrated(prior))):
                found = measured(vae, own, data, splits, seed) | seconds
                rows.setdefault(f"{members:>2} members, {way}", []).append(found)
    for title, each in rows.items():
        show(title, [(label, text([found[name] for found in each])) for name, label in
                     COLUMNS.items()])  # fmt: skip


def text(values: list[float]) -> str:
    """The mean over seeds, its standard error, and the values."""
    mean, each = statistics.mean(values), " ".join(f"{v:.3f}" for v in values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}  ({each})"


if __name__ == "__main__":
    main()
