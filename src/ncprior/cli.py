"""The command line. Torch is imported only once a command runs, so that --help answers at once."""

import json
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ncprior import __version__
from ncprior.terminal import has_styles, warned, wrapped

app = typer.Typer(
    name="ncprior",
    help="Mend the prior of a variational autoencoder with noise contrastive priors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

converters = typer.Typer(
    help="Make a run directory of a VAE that another program trained.", no_args_is_help=True
)
app.add_typer(converters, name="convert")

feature_spaces = typer.Typer(
    help="Train a feature space in which samples are measured.", no_args_is_help=True
)
app.add_typer(feature_spaces, name="features")

STOPPED, UNREAD = 130, 141
"""Exit codes after Ctrl-C and where nobody reads on, as shells have them."""


class Energised(StrEnum):
    base = "base"
    ncp = "ncp"


class Mean(StrEnum):
    arithmetic = "arithmetic"
    geometric = "geometric"


class Sampler(StrEnum):
    auto = "auto"
    sir = "sir"
    langevin = "langevin"
    annealed = "annealed"


class Preset(StrEnum):
    small = "small"
    large = "large"
    near = "near"
    stages = "stages"
    published = "published"
    groups = "groups"
    groups_small = "groups-small"
    groups_flat = "groups-flat"


SAMPLER = "How to draw from the NCP; auto: annealed for one in stages, SIR for any other."

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Resume = Annotated[bool, typer.Option(help="Go on where a stopped run was.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what is there.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything that is drawn.")]
Proposals = Annotated[
    str, typer.Option(metavar="auto|N", help="SIR's pool for each draw; auto: as few as do.")
]
Groups = Annotated[
    str | None, typer.Option(help="Latent groups that use the NCP, such as 0-4,7; all by default.")
]

Features = Annotated[
    str | None,
    typer.Option(
        help="Feature space: pixels, pca-64, mnist, inception, or what features train made."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ncprior {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
def demo(
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option(help="Run directory; runs/demo-SEED.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Train a VAE on real digits, see the hole in its prior, mend it, report. About a minute."""
    from ncprior.figures import as_json as figures_as_json
    from ncprior.pipeline import demo as run_demo

    out = out or Path("runs") / f"demo-{seed}"
    done = run_demo(out, seed=seed, resume=resume, overwrite=overwrite, progress=not as_json)
    found = done["diagnosis"]
    content = _flat(found.figures) | {
        "seconds": round(done["seconds"], 1),
        "seed": seed,
        "run": str(out),
        "report": str(done["report"]),
        "warnings": found.warnings,
        "figures": figures_as_json(found.figures),
    }
    _show(content, as_json, found)
    if not as_json:
        print(f"\n{done['seconds']:.0f} s. Open {done['report']}")


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file; see recipes/.")],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Stage 1: train the VAE of a recipe."""
    from ncprior.pipeline import train_run
    from ncprior.recipes import load_recipe

    changes = {"device": device} if device else {}
    run = train_run(
        load_recipe(recipe),
        out,
        resume=resume,
        overwrite=overwrite,
        progress=not as_json,
        **changes,
    )
    last = _last_row(run.path / "logs" / "vae.csv")
    _show({"run": str(run.path)} | last, as_json, f"VAE in {run.path}/vae. Next: ncprior fit {out}")


@app.command()
def fit(
    run: RunArgument,
    preset: Annotated[
        Preset | None, typer.Option(help="Network, batches and steps of the ratio.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="What the ratio multiplies: gaussian, mixture (10 components), mixture-N, "
            "mixture-auto, vamp, flow, autoregressive, two-stage, diffusion, lars, snis or ebm."
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(help="Fit these latent groups only, such as 0-4,7, as a part of the prior."),
    ] = None,
    stages: Annotated[
        str | None,
        typer.Option(help="Ratios in a row, a number or adaptive, where one separates perfectly."),
    ] = None,
    reencode: Annotated[
        bool | None,
        typer.Option(help="Let the ratio see latents decoded and encoded again, too."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps at most.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the fit.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Stage 2: fit a noise contrastive prior on the frozen VAE.

    Latent groups of a hierarchical VAE are independent: processes that torchrun or Slurm start on
    the same run each fit a share of them.
    """
    from ncprior.diagnosis import fit_summary, held_out_figures
    from ncprior.groups import spell_groups
    from ncprior.pipeline import fit_run
    from ncprior.runs import Run
    from ncprior.shares import process_place

    given = {"preset": preset, "base": base, "steps": steps, "seed": seed, "device": device}
    given["reencode"] = reencode
    given["stages"] = int(stages) if stages and stages.isdecimal() else stages
    changes = {
        k: str(v) if isinstance(v, StrEnum) else v for k, v in given.items() if v is not None
    }
    prior = fit_run(
        Run.open(run),
        groups=groups,
        resume=resume,
        overwrite=overwrite,
        progress=not as_json,
        **changes,
    )
    figures = held_out_figures(prior)
    doubts = [w for group in prior.record["groups"] if group for w in group["warnings"]]
    of_vae = prior.record.get("vae_warnings", [])  # which were printed when the fit began
    content = _flat(figures) | {"run": str(run), "warnings": [*of_vae, *doubts]}
    said = doubts if prior.num_groups == 1 else []  # the summary of several has its own
    missing = sorted(set(range(prior.num_groups)) - set(prior.fitted_groups))
    if missing:
        left = spell_groups(missing)
        said.append(
            f"Groups {left} keep their base prior until a part with them is fitted: "
            f"ncprior fit {run} --groups {left}"
            if process_place()[1] == 1
            else f"Groups {left} are still with other processes; they join by themselves."
        )
    lines = [
        fit_summary(prior),
        *map(warned, said),
        f"Next: ncprior diagnose {run}",
    ]
    _show(content, as_json, "\n".join(lines))


@app.command()
def combine(
    run: RunArgument,
    priors: Annotated[
        list[str],
        typer.Argument(
            metavar="PRIOR...",
            help="ncp, what compare fitted (such as mixture-auto), or other runs of the same VAE.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    mean: Annotated[
        Mean, typer.Option(help="arithmetic: a mixture of them; geometric: where they agree.")
    ] = Mean.arithmetic,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Combine priors of one VAE into their weighted mean, an NCP in a run of its own.

    Validation images choose the weights.
    """
    from ncprior.diagnosis import combined_summary
    from ncprior.pipeline import combine_run
    from ncprior.runs import Run

    prior = combine_run(
        Run.open(run),
        priors,
        out,
        mean=mean.value,
        seed=seed,
        overwrite=overwrite,
        device=device or "auto",
        progress=not as_json,
    )
    content = {"run": str(out), "seed": seed}
    content |= {name: prior.record[name] for name in ("combined", "bound", "gain")}
    text = f"{combined_summary(prior)}\nNext: ncprior diagnose {out}"
    _show(content, as_json, text)


@app.command()
def energy(
    run: RunArgument,
    prior: Annotated[Energised, typer.Option(help="The prior to put it on.")] = Energised.ncp,
    network: Annotated[
        str | None, typer.Option(help="conv, or mlp for small images on a CPU.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    langevin_steps: Annotated[
        int | None, typer.Option(min=1, help="Langevin steps of each short run.")
    ] = None,
    step_size: Annotated[float | None, typer.Option(help="Their size, eta.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Adam's peak rate.")] = None,
    pixel_noise: Annotated[
        bool | None,
        typer.Option(help="Whether images are the decoder's mean plus noise, or the mean."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the fit.")] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Fit an energy on images on top of a prior (VAEBM), into RUN/energy.

    Then: ncprior sample RUN --energy, ncprior evaluate RUN --priors base,base+energy,ncp,ncp+energy
    """
    from ncprior.pipeline import energy_run
    from ncprior.runs import Run

    given = {
        "network": network,
        "steps": steps,
        "langevin_steps": langevin_steps,
        "step_size": step_size,
        "learning_rate": learning_rate,
        "pixel_noise": pixel_noise,
        "seed": seed,
        "device": device,
    }
    found = energy_run(
        Run.open(run),
        prior.value,
        resume=resume,
        overwrite=overwrite,
        progress=not as_json,
        **{name: value for name, value in given.items() if value is not None},
    )
    record = found.record
    names = ("heldout_fd", "heldout_fd_without", "best_step", "steps", "seed", "warnings")
    content = {"run": str(run), "prior": prior.value} | {name: record[name] for name in names}
    lines = [
        wrapped(
            f"Frechet distance of samples to {record['heldout_images']} held-out images: "
            f"{record['heldout_fd']:.4g} with the energy of step {record['best_step']}, "
            f"{record['heldout_fd_without']:.4g} without ({record['features']})."
        ),
        *map(warned, record["warnings"]),
        f"Next: ncprior evaluate {run} --metrics fd --priors {prior.value},{prior.value}+energy",
    ]
    _show(content, as_json, "\n".join(lines))


@app.command()
def sample(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="File to write, .npz; a .png beside it shows 64.")],
    prior: Annotated[
        str, typer.Option(help="base, ncp, reconstruction, or what compare fitted.")
    ] = "ncp",
    num: Annotated[int, typer.Option(min=1, help="Number of images.")] = 64,
    seed: Seed = 0,
    energy: Annotated[bool, typer.Option(help="With the energy that was fitted on it.")] = False,
    sampler: Annotated[Sampler, typer.Option(help=SAMPLER)] = Sampler.auto,
    groups: Groups = None,
    proposals: Proposals = "auto",
    temperature: Annotated[float, typer.Option(help="Factor on the base's deviation.")] = 1.0,
    batch_norm_passes: Annotated[
        int,
        typer.Option(min=0, help="Base batches for new batch-norm statistics, 500 in NVAE."),
    ] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 500,
    bfloat16: Annotated[bool, typer.Option(help="Let SIR weigh proposals in bfloat16.")] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Draw images and latents into an .npz file."""
    from ncprior.pipeline import sample_run
    from ncprior.runs import Run

    sample_run(
        Run.open(run),
        prior,
        out,
        seed=seed,
        num=num,
        energy=energy,
        sampler=sampler.value,
        groups=groups,
        proposals=_pool(proposals),
        temperature=temperature,
        batch_norm_passes=batch_norm_passes,
        bfloat16=bfloat16,
        batch_size=batch_size,
        overwrite=overwrite,
        progress=not as_json,
    )
    picture = out.with_suffix(".png")
    content = {"out": str(out), "picture": str(picture), "prior": prior, "num": num}
    _show(content | {"seed": seed}, as_json, f"{num} images in {out}; a look at them: {picture}")


@app.command()
def diagnose(
    run: RunArgument,
    samples: Annotated[int | None, typer.Option(min=40, help="Images from each source.")] = None,
    proposals: Annotated[int | None, typer.Option(min=1, help="SIR's pool.")] = None,
    sampler: Annotated[Sampler | None, typer.Option(help=SAMPLER)] = None,
    groups: Groups = None,
    group_samples: Annotated[
        int | None, typer.Option(min=0, help="Draws to compare in each latent group; 0 for none.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of what is drawn.")] = None,
    as_json: Json = False,
) -> None:
    """Say how large the prior's hole is and how much of it the NCP closes."""
    from ncprior.figures import as_json as figures_as_json
    from ncprior.pipeline import diagnose_run
    from ncprior.runs import Run

    given = {
        "samples": samples,
        "proposals": proposals,
        "sampler": sampler.value if sampler else None,
        "groups": groups,
        "group_samples": group_samples,
        "seed": seed,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    found = diagnose_run(Run.open(run), progress=not as_json, **changes)
    content = _flat(found.figures) | {
        "answers": [answer._asdict() for answer in found.answers],
        "warnings": found.warnings,
        "figures": figures_as_json(found.figures),
    }
    _show(content, as_json, found)


@app.command()
def evaluate(
    run: RunArgument,
    priors: Annotated[
        str,
        typer.Option(
            help="Comma-separated: base, ncp, either with +energy, and what compare fitted."
        ),
    ] = "base,ncp",
    metrics: Annotated[
        str,
        typer.Option(
            help="Comma-separated: nll, fd, fd_infinity, kid, prdc, near, modes, mmd, c2st, swd."
        ),
    ] = "fd,nll",
    samples: Annotated[int, typer.Option(min=40, help="Images from each prior.")] = 10_000,
    sampler: Annotated[Sampler, typer.Option(help=SAMPLER)] = Sampler.auto,
    proposals: Proposals = "auto",
    images: Annotated[int, typer.Option(min=2, help="Test images for nll.")] = 1000,
    importance_samples: Annotated[int, typer.Option(min=1, help="Draws per image.")] = 200,
    log_z_draws: Annotated[int, typer.Option(min=2, help="Base draws for log Z.")] = 2_000_000,
    log_z_methods: Annotated[
        str | None,
        typer.Option(help="Of base, ais, bridge; all for one latent group, base for several."),
    ] = None,
    features: Features = None,
    classifier: Annotated[
        str | None, typer.Option(help="What tells classes, for modes; the features by default.")
    ] = None,
    seed: Seed = 0,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Score priors: likelihood, sample quality and closeness of the latents. One table.

    docs/measures.md says which figure to trust when.
    """
    from ncprior.figures import as_json as figures_as_json
    from ncprior.pipeline import evaluate_run
    from ncprior.runs import Run

    scores = evaluate_run(
        Run.open(run),
        priors=_names(priors),
        metrics=_names(metrics),
        samples=samples,
        sampler=sampler.value,
        proposals=_pool(proposals),
        images=images,
        importance_samples=importance_samples,
        log_z_draws=log_z_draws,
        log_z_methods=_names(log_z_methods) if log_z_methods else None,
        features=features,
        classifier=classifier,
        seed=seed,
        resume=resume,
        progress=not as_json,
    )
    content = _flat(scores) | {"warnings": scores.warnings, "figures": figures_as_json(scores)}
    _show(content, as_json, scores)


@app.command()
def compare(
    run: RunArgument,
    priors: Annotated[
        str,
        typer.Option(
            help="Comma-separated: gaussian, mixture (10 components), mixture-N, mixture-auto, "
            "vamp, flow, autoregressive, two-stage, diffusion, lars, snis, ebm, ncp, "
            "ncp-multistage, ncp-BASE, such as ncp-mixture-auto, and A+B, which combines them."
        ),
    ] = "gaussian,mixture,vamp,flow,diffusion,two-stage,lars,snis,ebm,ncp,ncp-multistage",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 up to this.")] = 5,
    metrics: Annotated[
        str, typer.Option(help="Comma-separated: nll, fd, fd_infinity, kid, prdc, near, modes.")
    ] = "nll,fd,kid,prdc",
    samples: Annotated[int, typer.Option(min=40, help="Images from each prior.")] = 10_000,
    proposals: Proposals = "auto",
    images: Annotated[int, typer.Option(min=2, help="Test images for nll.")] = 1000,
    importance_samples: Annotated[int, typer.Option(min=1, help="Draws per image.")] = 100,
    slow_nll: Annotated[
        bool, typer.Option("--slow-nll", help="Take nll of the diffusion prior too: an hour.")
    ] = False,
    features: Features = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Which prior should this VAE have? Fit several on it and measure them side by side."""
    from ncprior.pipeline import compare_run
    from ncprior.runs import Run

    found = compare_run(
        Run.open(run),
        priors=_names(priors),
        seeds=seeds,
        metrics=_names(metrics),
        samples=samples,
        proposals=_pool(proposals),
        images=images,
        importance_samples=importance_samples,
        slow_nll=slow_nll,
        features=features,
        resume=resume,
        progress=not as_json,
    )
    content = {"run": str(run), "scores": [score._asdict() for score in found.scores]}
    table = found.text(styled=has_styles())
    _show(content, as_json, f"{table}\n\nAs Markdown and as a picture in {run}/compare.")


@app.command()
def report(run: RunArgument, as_json: Json = False) -> None:
    """Write RUN/report.html, one file that needs no network."""
    from ncprior.report import write_report
    from ncprior.runs import Run

    path = write_report(Run.open(run))
    _show({"report": str(path)}, as_json, f"Open {path}")


@converters.command("nvae")
def convert_nvae(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A file of the published NVAE program.")
    ],
    out: Annotated[Path, typer.Option(help="Run directory to make.")],
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML file whose [data], [fit], [diagnose] to take.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a published NVAE checkpoint. Nothing in the file is executed."""
    from ncprior.pipeline import convert_nvae as convert
    from ncprior.recipes import load_recipe
    from ncprior.runs import Run

    given = load_recipe(recipe) if recipe else None
    run = convert(checkpoint, out, recipe=given, overwrite=overwrite)
    vae = Run.open(out).load_vae()
    content = {
        "run": str(out),
        "image_shape": list(vae.image_shape),
        "num_groups": vae.num_groups,
        "parameters": sum(p.numel() for p in vae.parameters()),
        "likelihood": vae.config["likelihood"],
    }
    then = f"ncprior fit {out}"
    if not run.section("data"):
        then = f"add [data] to {out}/config.toml, then {then}"
    text = (
        f"NVAE of {content['num_groups']} groups and {content['parameters']:,} parameters in "
        f"{out}/vae. Next: {then}"
    )
    _show(content, as_json, text)


@feature_spaces.command("train")
def train_feature_space(
    dataset: Annotated[
        str,
        typer.Argument(
            metavar="DATASET", help="digits, a path of idx or parquet files, or a recipe."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Directory to make; evaluate takes it as --features.")],
    class_names: Annotated[
        str | None, typer.Option(help="Comma-separated; the numbers 0, 1, ... by default.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes through the training images.")] = 10,
    seed: Seed = 0,
    resume: Resume = False,
    overwrite: Overwrite = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a small classifier on labelled images: its classes and features measure samples."""
    from ncprior.feature_training import train_feature_directory

    content = train_feature_directory(
        dataset,
        out,
        class_names=class_names.split(",") if class_names else None,
        epochs=epochs,
        seed=seed,
        resume=resume,
        overwrite=overwrite,
        device=device or "auto",
        progress=not as_json,
    )
    text = (
        f"Features {content['name']} ({content['sha256'][:8]}) in {out}; right on "
        f"{content['test_accuracy']:.2%} of {content['test_images']} test images. "
        f"Next: ncprior evaluate RUN --metrics fd,kid,prdc,modes --features {out}"
    )
    _show({"out": str(out)} | content, as_json, text)


def main() -> None:
    """Run a command; a user's mistake is one line on standard error and exit code 2."""
    try:
        code = _run()
        sys.stdout.flush()
    except BrokenPipeError:  # into head, for example; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = UNREAD
    sys.exit(code)


def _run() -> int:
    """Run a command and return its exit code."""
    warnings.showwarning = lambda message, *_: print(warned(str(message)), file=sys.stderr)
    try:
        code = int(app(standalone_mode=False) or 0)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except BrokenPipeError:
        raise
    except Exception as error:
        usage = getattr(error, "format_message", None)  # click's, or the copy of it within typer
        kind = type(error).__name__
        if usage and kind == "NoArgsIsHelpError":
            print(usage())
            return 0
        expected = isinstance(error, ValueError | TypeError | OSError | ModuleNotFoundError)
        if os.environ.get("NCPRIOR_TRACEBACK") or not (usage or expected or kind == "Interrupted"):
            raise
        message = usage() if usage else str(error)
        return _fail(message, {"Diverged": 1, "Interrupted": STOPPED}.get(kind, 2))
    if code == STOPPED:
        _fail("stopped; nothing is left half written", STOPPED)
    return code


def _fail(message: str, code: int) -> int:
    print(f"ncprior: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show(content: dict[str, Any], as_json: bool, text: Any) -> None:
    """Print once, where several processes work on the same command."""
    numbers = (os.environ.get(name) for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    if int(next((number for number in numbers if number), "0")) == 0:
        print(json.dumps(content) if as_json else text)


def _flat(figures: Any) -> dict[str, float]:
    """Values by name, and standard errors as NAME_se."""
    values = {name: figure.value for name, figure in figures.items()}
    errors = {f"{name}_se": f.se for name, f in figures.items() if f.se is not None}
    return values | errors


def _pool(text: str) -> int | str:
    """What --proposals says."""
    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return text if text == "auto" else int(text)
    raise ValueError(f"--proposals must be auto or a positive number, got {text!r}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _last_row(path: Path) -> dict[str, float]:
    import csv

    if not path.exists():
        return {}
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: float(value) for name, value in rows[-1].items()} if rows else {}


if __name__ == "__main__":
    main()
