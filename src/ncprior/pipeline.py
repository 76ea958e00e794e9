"""The jobs behind the commands: each reads a run directory, does one thing, and writes it back."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ncprior.answers import answers
from ncprior.candidates import check_names, load_fitted
from ncprior.comparison import PICTURED, RECONSTRUCTION, compare
from ncprior.data import ImageDataset, Splits, load_data
from ncprior.diagnosis import Diagnosis, diagnose
from ncprior.evaluation import Scores, evaluate
from ncprior.generation import Draws
from ncprior.groups import check_groups, spell_groups
from ncprior.numerics import stream_seed
from ncprior.priors import NoiseContrastivePrior
from ncprior.recipes import Recipe, check_recipe
from ncprior.report.pictures import grid
from ncprior.runs import Run
from ncprior.scoreboard import Comparison, save_comparison
from ncprior.shares import Parts, process_place, share_of
from ncprior.sources import Source, WithEnergy, reconstructions
from ncprior.storage import fingerprint, replacing, write_bytes
from ncprior.training import combine, fit_prior, train_vae
from ncprior.training.processes import check_device, in_turn, make_fabric
from ncprior.vaebm import ImageEnergy, fit_energy
from ncprior.vaes import build_vae
from ncprior.vaes.nvae.checkpoint import load_published

PICTURED_DRAWS = 64
KEPT_SECTIONS = ("data", "fit", "energy", "diagnose")
"""What a recipe says of a VAE that was trained elsewhere."""

BUILT_IN = ("base", "ncp")
ENERGY = "+energy"
"""What follows the name of a prior with an energy on top of it."""

DEMO: Recipe = {
    "data": {"source": "digits"},
    "vae": {"preset": "digits"},
    "train": {"steps": 2500, "batch_size": 128, "learning_rate": 1e-3, "weight_decay": 0.3},
    "fit": {"preset": "small", "base": "mixture-auto"},
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
    """Stage 1 into a run directory. `changes` go on top of the recipe's [train].

    The directory is made, or an old one replaced, once data and settings are found to work.
    """
    recipe = recipe | {"train": recipe.get("train", {}) | changes}
    check_recipe(recipe, "recipe")
    options = recipe["train"]
    where = {name: options[name] for name in ("device", "precision", "devices") if name in options}
    fabric = make_fabric(**where)
    look = lambda: _look(recipe, out, resume, overwrite)
    old, loaded = in_turn(fabric, look, look)  # one process alone fills the data's cache
    if loaded is None:
        return Run.open(out)
    data, splits = loaded
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(options.get("seed", 0), "vae weights"))
        vae = build_vae(
            data.image_shape,
            image_mean=data.raw(splits.train[:20_000]).mean(0),
            **recipe.get("vae", {}),
        )

    def begin() -> None:
        run = old or _start(recipe, out)
        run.config["train"] = recipe["train"]
        run.write_config()
        run.write_splits(**splits._asdict())

    train_vae(
        vae,
        data,
        splits,
        directory=out,
        begin=lambda: in_turn(fabric, begin, lambda: None),
        resume=resume,
        progress=progress,
        **options,
    )
    vae.cpu()
    run = Run.open(out)
    if fabric.is_global_zero:
        run.save_vae(vae)
        (run.path / "vae-checkpoint.pt").unlink(missing_ok=True)
    fabric.barrier()
    return run


def convert_nvae(
    checkpoint: Path, out: Path, *, recipe: Recipe | None = None, overwrite: bool = False
) -> Run:
    """A published NVAE checkpoint as a run directory, with [data], [fit], [diagnose] of `recipe`.

    Without a recipe, [data] is for the user to add before anything that needs images.
    """
    _check_free(out, overwrite)
    vae = load_published(checkpoint)
    size = {name: value for name, value in vae.config.items() if name != "image_shape"}
    kept = {name: (recipe or {})[name] for name in KEPT_SECTIONS if name in (recipe or {})}
    run = _start({"vae": {"network": "nvae"} | size} | kept, out)
    run.save_vae(vae)
    return run


def fit_run(
    run: Run,
    *,
    groups: str | Sequence[int] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **changes: Any,
) -> NoiseContrastivePrior:
    """Stage 2 in a run directory. `changes` go on top of its [fit].

    With `groups` only these latent groups are fitted, as a part that joins the others. Processes
    that torchrun or Slurm started each take a share of them.
    """
    vae = run.load_vae()
    number, count = process_place()
    if groups is None:
        groups = run.section("fit").get("groups")
    wanted = None if groups is None else check_groups(groups, vae.num_groups)
    if count > 1:
        wanted = share_of(wanted or range(vae.num_groups), number, count)
    parts, place = Parts(run), "ncp" if wanted is None else f"ncp-{spell_groups(wanted)}"
    done = run.has_prior if wanted is None else parts.has(wanted)
    if done and resume:
        return run.load_prior(vae)
    checkpoint = run.path / f"{place}-checkpoint.pt"
    in_the_way = parts.names() if wanted is None else parts.overlapping(wanted)
    whole = run.has_prior and not parts.names()
    if (whole or in_the_way or (checkpoint.exists() and not resume)) and not overwrite:
        what = "a fitted prior" if run.has_prior else "an unfinished fit"
        of = f" of groups {'; '.join(in_the_way)}" if in_the_way else ""
        raise ValueError(
            f"{run.path} holds {what}{of}; pass --resume to go on or --overwrite to refit"
        )
    fit = {name: v for name, v in (run.section("fit") | changes).items() if name != "groups"}
    check_recipe({"fit": fit}, "fit")
    check_device(fit.get("device", "auto"))
    if not resume:
        checkpoint.unlink(missing_ok=True)
    data, splits = run.load_data()
    prior = fit_prior(
        vae,
        data,
        rows=splits.train,
        groups=wanted,
        directory=run.path,
        resume=resume,
        progress=progress and number == 0,
        **fit,
    ).cpu()
    run.config["fit"] = run.section("fit") | changes
    if in_the_way:
        parts.remove(in_the_way)
    if wanted is None:
        run.save_prior(prior)
    else:
        prior = parts.add(prior)
    (run.path / "metrics.json").unlink(missing_ok=True)  # its figures were of another prior
    run.write_config()
    checkpoint.unlink(missing_ok=True)
    return prior


def combine_run(
    run: Run,
    priors: Sequence[str],
    out: Path,
    *,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> NoiseContrastivePrior:
    """Combine priors of a run's VAE into a run directory of their own, by the validation images.

    Each of `priors` is "ncp", the name of one that `compare` fitted with seed 0, or another run
    directory of the same VAE whose NCP is meant. `options` are those of `combine`.
    """
    _check_free(out, overwrite)
    if out.resolve() in {path.resolve() for path in (run.path, *map(Path, priors))}:
        raise ValueError(f"--out must be another directory than those combined, got {out}")
    check_device(options.get("device", "auto"))
    vae = run.load_vae()
    found = [_named_prior(run, vae, name) for name in priors]
    data, splits = run.load_data()
    prior = combine(
        vae, found, data, rows=splits.validation, names=list(priors), progress=progress, **options
    ).cpu()
    config = {k: v for k, v in run.config.items() if isinstance(v, dict) and k != "fit"}
    made = _start(config, out)
    made.write_splits(**splits._asdict())
    made.save_vae(vae)
    made.save_prior(prior)
    return prior


def _named_prior(run: Run, vae: Any, name: str) -> Any:
    if name == "ncp":
        return run.load_prior(vae)
    if not (Path(name) / "config.toml").exists():
        return load_compared(run, vae, name, others=("ncp", "run directories of the same VAE"))
    other = Run.open(Path(name))
    if fingerprint(other.load_vae()) != fingerprint(vae):
        raise ValueError(
            f"{name} holds another VAE than {run.path}: only priors of one VAE can be combined"
        )
    return other.load_prior(vae)


def energy_run(
    run: Run,
    which: str,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **changes: Any,
) -> ImageEnergy:
    """Fit an energy on images (VAEBM) on "base" or "ncp" into RUN/energy.

    `changes` go on top of the run's [energy].
    """
    vae, prior = _under(run, which)
    where, checkpoint = run.path / "energy" / which, run.path / f"energy-{which}-checkpoint.pt"
    done = (where / "config.json").exists()
    if done and resume:
        return load_energy(run, which).energy
    if (done or (checkpoint.exists() and not resume)) and not overwrite:
        what = "a fitted energy" if done else "an unfinished fit of an energy"
        raise ValueError(
            f"{run.path} holds {what} on {which}; pass --resume to go on or --overwrite to refit"
        )
    options = run.section("energy") | changes
    check_recipe({"energy": options}, "energy")
    check_device(options.get("device", "auto"))
    if not resume:
        checkpoint.unlink(missing_ok=True)
    data, splits = run.load_data()
    energy = fit_energy(
        vae,
        prior,
        data,
        rows=splits.train,
        heldout_rows=splits.validation,
        directory=run.path,
        part=f"-{which}",
        resume=resume,
        progress=progress,
        **options,
    ).cpu()
    energy.save_pretrained(where)
    run.config["energy"] = options
    run.write_config()
    checkpoint.unlink(missing_ok=True)
    return energy


def load_energy(run: Run, which: str) -> WithEnergy:
    """The prior "base" or "ncp" of a run with the energy that was fitted on it."""
    if which not in BUILT_IN:
        raise ValueError(f"an energy is fitted on {' or '.join(BUILT_IN)}, got {which!r}")
    where = run.path / "energy" / which
    if not (where / "config.json").exists():
        raise FileNotFoundError(
            f"{run.path} holds no energy on {which} yet; run "
            f"'ncprior energy {run.path} --prior {which}'"
        )
    vae, prior = _under(run, which)
    energy = ImageEnergy.from_pretrained(where)
    try:
        energy.check(vae, prior)
    except ValueError as error:
        raise ValueError(
            f"{where}: {error} with 'ncprior energy {run.path} --prior {which} --overwrite'"
        ) from None
    base = None if vae.num_groups > 1 else vae.prior
    return WithEnergy(base if prior is None else prior, energy)


def _under(run: Run, which: str) -> tuple[Any, NoiseContrastivePrior | None]:
    """The VAE of a run and the NCP on it; for "base" the VAE on the base that the NCP stands on."""
    vae = run.load_vae()
    if which == "ncp":
        return vae, run.load_prior(vae)
    return (run.load_prior(vae).under(vae) if run.has_prior else vae), None


def diagnose_run(run: Run, *, progress: bool = True, **changes: Any) -> Diagnosis:
    """Measure the hole and what the prior closes; add the figures to the run."""
    vae = run.load_vae()
    prior = run.load_prior(vae)
    data, splits = run.load_data()
    options = run.section("diagnose") | changes
    found = diagnose(vae, data, splits, prior, progress=progress, **options)
    said = answers(prior, found.figures, found.groups, run=str(run.path))
    run.add_metrics(found.figures)
    return found._replace(answers=said)


def evaluate_run(
    run: Run,
    *,
    priors: Sequence[str] = ("base", "ncp"),
    resume: bool = False,
    progress: bool = True,
    **options: Any,
) -> Scores:
    """Score base prior, NCP and priors that `compare` fitted; add the figures to the run."""
    vae = run.load_vae()
    others = {name: _other_prior(run, vae, name) for name in priors if name not in BUILT_IN}
    wanted = "ncp" in priors and (run.has_prior or tuple(priors) != ("base", "ncp"))
    vae, prior = _under(run, "ncp" if wanted else "base")
    data, splits = run.load_data()
    scores = evaluate(
        vae,
        prior,
        data,
        splits,
        priors=others,
        directory=run.path / "samples" / "evaluate",
        resume=resume,
        progress=progress,
        **options,
    )
    run.add_metrics(scores)
    return scores


def _other_prior(run: Run, vae: Any, name: str, also: Sequence[str] = ()) -> Any:
    """One with an energy on it, or that `compare` fitted; errors name those in `also`, too."""
    if name.endswith(ENERGY):
        return load_energy(run, name.removesuffix(ENERGY))
    return load_compared(run, vae, name, (*BUILT_IN, "either with +energy", *also))


def load_compared(run: Run, vae: Any, name: str, others: Sequence[str] = BUILT_IN) -> Any:
    """A prior that `compare` fitted on this VAE with seed 0; errors name `others` that would do."""
    if vae.num_groups > 1:
        raise ValueError(
            f"priors of a VAE with {vae.num_groups} latent groups must be of {', '.join(others)}, "
            f"got {name!r}"
        )
    check_names([name], others)
    where = run.path / "compare" / "priors"
    found = load_fitted(where, name, 0, vae)
    if found is None:
        have = sorted({path.parent.name.rpartition("-")[0] for path in where.glob("*/fit.json")})
        only = f", only {', '.join(have)}" if have else ""
        raise ValueError(
            f"{run.path} holds no prior {name!r} of this VAE{only}; "
            f"fit it with 'ncprior compare {run.path} --priors {name} --seeds 1'"
        )
    return found[0]


def compare_run(run: Run, *, progress: bool = True, **options: Any) -> Comparison:
    """Fit and measure priors side by side; RUN/compare gets the table, the scores and a picture."""
    vae = run.load_vae()
    data, splits = run.load_data()
    fit = {k: v for k, v in run.section("fit").items() if k not in ("base", "groups", "seed")}
    check_recipe({"fit": fit}, "fit")
    where = run.path / "compare"
    found = compare(
        vae, data, splits, fit=fit, directory=where / "priors", progress=progress, **options
    )
    save_comparison(found, where)
    write_bytes(where / "comparison.md", f"{found.markdown()}\n{found.legend()}\n".encode())
    if found.pictures:
        shown = torch.cat([images[:PICTURED] for images in found.pictures.values()])
        picture = grid(shown, columns=PICTURED, labels=list(found.pictures))
        write_bytes(where / "comparison.png", picture)
    return found


def sample_run(
    run: Run,
    which: str,
    out: Path,
    *,
    seed: int,
    num: int = 64,
    energy: bool = False,
    overwrite: bool = False,
    **options: Any,
) -> Draws:
    """Draw into an .npz with `images` and `latents`; a .png beside it shows the first 64.

    From "base", "ncp", "reconstruction" or what `compare` fitted; with `energy`, or a name that
    ends in "+energy", from "base" or "ncp" with the energy on images that was fitted on it.
    """
    picture = out.with_suffix(".png")
    if out.suffix != ".npz":
        raise ValueError(f"--out must end in .npz, got {out}")
    for path in (out, picture):
        if path.exists() and not overwrite:
            raise ValueError(f"{path} is already there; pass --overwrite, or another --out")
    source = _source(run, f"{which}{ENERGY}" if energy else which, seed)
    draws = source.draw(num, seed=seed, **options)
    arrays: dict[str, Any] = {"images": draws.images.numpy()}
    if len(draws.latents) == 1:
        arrays["latents"] = draws.latents[0].numpy()
    else:
        arrays |= {f"latents_{k}": z.numpy() for k, z in enumerate(draws.latents)}
    with replacing(out) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
    write_bytes(picture, grid(draws.images[:PICTURED_DRAWS]))
    return draws


def _source(run: Run, which: str, seed: int) -> Source:
    """What a name stands for, to draw from."""
    if which in BUILT_IN:
        return Source(*_under(run, which))
    vae = run.load_vae()
    if which == RECONSTRUCTION:
        return reconstructions(vae, *run.load_data(), seed)
    return Source.of(vae, _other_prior(run, vae, which, [RECONSTRUCTION]))


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


def _look(
    recipe: Recipe, out: Path, resume: bool, overwrite: bool
) -> tuple[Run | None, tuple[ImageDataset, Splits] | None]:
    """The run to take up again, None for a new one, and the data; none if its VAE is trained."""
    if not (resume and (out / "config.toml").exists()):
        _check_free(out, overwrite, "--resume to go on, --overwrite to start anew")
        return None, load_data(**recipe.get("data", {}))
    run = Run.open(out)
    for section in ("data", "vae", "train"):
        if _lasting(run.section(section)) != _lasting(recipe.get(section, {})):
            raise ValueError(
                f"[{section}] of the recipe is not that of {out}/config.toml, so the run "
                "cannot go on as it was; restore it, or use another --out"
            )
    return run, None if run.has_vae else run.load_data()


def _check_free(out: Path, overwrite: bool, options: str = "--overwrite") -> None:
    """Raise ValueError where no run can be made, or where one is that shall not be lost."""
    Run.check_new(out)
    if (out / "config.toml").exists() and not overwrite:
        raise ValueError(f"{out} already holds a run; pass {options}, or another --out")


def _start(recipe: Recipe, out: Path) -> Run:
    """A new run directory, in place of the run that is there."""
    if (out / "config.toml").exists():
        shutil.rmtree(out)
    return Run.create(out, recipe)


def _lasting(section: dict[str, Any]) -> dict[str, Any]:
    """A section without what may change when a run is taken up again, after a NaN for example."""
    changeable = {"learning_rate", "learning_rate_end", "clip_norm", "retries"}
    changeable |= {"device", "devices", "precision", "tensorboard"}
    return {name: value for name, value in section.items() if name not in changeable}
