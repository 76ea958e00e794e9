"""The jobs behind the commands: each reads a run directory, does one thing, and writes it back."""

import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ncprior.diagnosis import Diagnosis, diagnose
from ncprior.evaluation import evaluate, training_images
from ncprior.figures import Figures
from ncprior.generation import Draws, draw
from ncprior.numerics import stream_seed
from ncprior.priors import NoiseContrastivePrior
from ncprior.recipes import Recipe, check_recipe
from ncprior.runs import Run
from ncprior.storage import replacing
from ncprior.training import fit_prior, train_vae
from ncprior.vaes import build_vae

DEMO: Recipe = {
    "data": {"source": "digits"},
    "vae": {"preset": "digits"},
    "train": {"steps": 2500, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.3},
    "fit": {"preset": "small"},
    "diagnose": {"samples": 5000, "proposals": 1000},
}


def train_run(
    recipe: Recipe,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **changes: Any,
) -> Run:
    """Stage 1 into a run directory. `changes` go on top of the recipe's [train]."""
    recipe = recipe | {"train": recipe.get("train", {}) | changes}
    check_recipe(recipe, "recipe")
    run = _start(recipe, out, resume, overwrite)
    if run.has_vae:
        return run
    data, splits = run.load_data()
    options = run.section("train")
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(options.get("seed", 0), "vae weights"))
        vae = build_vae(
            data.image_shape,
            image_mean=data.raw(splits.train[:20_000]).mean(0),
            **run.section("vae"),
        )
    train_vae(
        vae,
        data,
        splits,
        directory=run.path,
        resume=resume,
        progress=progress,
        **options,
    )
    run.save_vae(vae.cpu())
    (run.path / "vae-checkpoint.pt").unlink(missing_ok=True)
    return run


def fit_run(
    run: Run,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **changes: Any,
) -> NoiseContrastivePrior:
    """Stage 2 in a run directory. `changes` go on top of its [fit]."""
    vae = run.load_vae()
    if run.has_prior and resume:
        return run.load_prior(vae)
    checkpoint = run.path / "ncp-checkpoint.pt"
    if (run.has_prior or checkpoint.exists()) and not resume and not overwrite:
        what = "a fitted prior" if run.has_prior else "an unfinished fit"
        raise ValueError(f"{run.path} holds {what}; pass --resume to go on or --overwrite to refit")
    if not resume:
        checkpoint.unlink(missing_ok=True)
    run.config["fit"] = run.section("fit") | changes
    check_recipe({"fit": run.config["fit"]}, "fit")
    data, splits = run.load_data()
    prior = fit_prior(
        vae,
        data,
        rows=splits.train,
        directory=run.path,
        resume=resume,
        progress=progress,
        **run.config["fit"],
    )
    run.save_prior(prior.cpu())
    (run.path / "metrics.json").unlink(missing_ok=True)  # its figures were of another prior
    run.write_config()
    checkpoint.unlink(missing_ok=True)
    return prior


def diagnose_run(run: Run, *, progress: bool = True, **changes: Any) -> Diagnosis:
    """Measure the hole and what the prior closes; add the figures to the run."""
    vae = run.load_vae()
    prior = run.load_prior(vae)
    data, splits = run.load_data()
    options = run.section("diagnose") | changes
    found = diagnose(vae, data, splits, prior, progress=progress, **options)
    run.add_metrics(found.figures)
    return found


def evaluate_run(run: Run, *, progress: bool = True, **options: Any) -> Figures:
    """Score base prior and NCP; add the figures to the run."""
    vae = run.load_vae()
    prior = run.load_prior(vae) if run.has_prior else None
    data, splits = run.load_data()
    figures = evaluate(vae, prior, data, splits, progress=progress, **options)
    run.add_metrics(figures)
    return figures


def sample_run(run: Run, which: str, out: Path, *, seed: int, **options: Any) -> Draws:
    """Draw from "base", "ncp" or "reconstruction" into an .npz with `images` and `latents`."""
    vae = run.load_vae()
    prior = run.load_prior(vae) if which == "ncp" or run.has_prior else None
    if which == "base" and prior is not None:
        vae = prior.under(vae)  # the base that the NCP stands on
    prior = prior if which == "ncp" else None
    images = training_images(*run.load_data(), seed) if which == "reconstruction" else None
    draws = draw(vae, prior, images=images, seed=seed, **options)
    arrays: dict[str, Any] = {"images": draws.images.numpy()}
    if len(draws.latents) == 1:
        arrays["latents"] = draws.latents[0].numpy()
    else:
        arrays |= {f"latents_{k}": z.numpy() for k, z in enumerate(draws.latents)}
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    return draws


def demo(out: Path, *, seed: int, resume: bool, overwrite: bool, progress: bool) -> dict[str, Any]:
    """The whole story on the digits of scikit-learn."""
    from ncprior.report import write_report

    began = time.perf_counter()
    recipe = {name: dict(section) for name, section in DEMO.items()}
    for section in ("data", "train", "fit", "diagnose"):
        recipe[section]["seed"] = seed
    run = train_run(recipe, out, resume=resume, overwrite=overwrite, progress=progress)
    fit_run(run, resume=resume, progress=progress)
    found = diagnose_run(run, progress=progress)
    report = write_report(run)
    seconds = time.perf_counter() - began
    return {"diagnosis": found, "report": report, "seconds": seconds}


def _start(recipe: Recipe, out: Path, resume: bool, overwrite: bool) -> Run:
    """The run directory to work in: new, taken up again, or emptied."""
    exists = (out / "config.toml").exists()
    if exists and resume:
        run = Run.open(out)
        for section in ("data", "vae", "train"):
            if _lasting(run.section(section)) != _lasting(recipe.get(section, {})):
                raise ValueError(
                    f"[{section}] of the recipe is not that of {out}/config.toml, so the run "
                    "cannot go on as it was; restore it, or use another --out"
                )
        run.config["train"] = recipe.get("train", {})
        run.write_config()
        return run
    if exists and not overwrite:
        raise ValueError(
            f"{out} already holds a run; pass --resume to go on, --overwrite to start anew, or "
            "another --out"
        )
    if exists:
        shutil.rmtree(out)
    return Run.create(out, recipe)


def _lasting(section: dict[str, Any]) -> dict[str, Any]:
    """A section without what may change when a run is taken up again, after a NaN for example."""
    changeable = {"learning_rate", "clip_norm", "device", "precision", "tensorboard"}
    return {name: value for name, value in section.items() if name not in changeable}
