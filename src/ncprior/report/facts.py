"""What was done: settings, sizes and training curves, as rows for tables and plots."""

import csv
import math
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ncprior.data import ImageDataset
from ncprior.figures import VAE_PRIOR, Figure
from ncprior.priors import NoiseContrastivePrior
from ncprior.report.words import base_name, describe
from ncprior.runs import Run

Rows = list[tuple[str, str]]
KEPT = ("C2ST", "ESS", "FD", "JSD", "KID", "KL", "MMD", "NCE", "NCP", "NLL", "SWD", "VAE", "Z")
WRITTEN = {word.lower(): word for word in KEPT}
COLORED = ("base", "ncp", VAE_PRIOR, "reconstruction")


class FigureRow(NamedTuple):
    """A line of the table of figures."""

    name: str
    color: str  # that of what the name ends in, or ""
    value: str
    error: str
    unit: str
    samples: str
    seed: int
    note: str


def figure_row(name: str, figure: Figure) -> FigureRow:
    """One figure of metrics.json, written out."""
    color = next((c for c in COLORED if name.endswith(f"_{c}")), "")
    return FigureRow(
        " ".join(WRITTEN.get(word, word) for word in name.split("_")),
        color,
        figure.text(),
        figure.error(),
        figure.unit,
        f"{figure.samples:,}",
        figure.seed,
        figure.note,
    )


def read_curves(file: Path) -> list[dict[str, float]]:
    """The rows of a training log that are whole and finite; none if there is no log."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        rows = [
            {name: _number(text) for name, text in row.items() if name is not None}
            for row in csv.DictReader(lines)
        ]
    kept = [{k: v for k, v in row.items() if math.isfinite(v)} for row in rows]
    return [row for row in kept if "step" in row]


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def fitting(prior: NoiseContrastivePrior) -> Rows:
    """How stage 2 went."""
    record = prior.record
    if "combined" in record:
        return _combined(record)
    groups = [group for group in record["groups"] if group is not None]
    kept = f"{record['best_step']:,}, where the held-out loss was lowest"
    if len(record["groups"]) > 1:
        steps = sorted(group["best_step"] for group in groups)
        kept = f"{steps[0]:,} to {steps[-1]:,}, in each group where its held-out loss was lowest"
    rows = [
        ("Steps run", f"{record['steps']:,}"),
        ("Step kept", kept),
        ("Images fitted on", f"{record['fitted_images']:,}"),
        ("Images held out", f"{record['heldout_images']:,}"),
    ]
    if len(record["groups"]) > 1:
        total = sum(group["kl"] for group in groups)
        rows.append(("Groups fitted", f"{len(groups)} of {len(record['groups'])}"))
        return [*rows, ("KL(q(z|x) ‖ p(z)), their sum", f"{total:.2f} nats")]
    for group in groups:
        low, high = group["loss_interval"]
        rows += [
            ("Held-out loss", f"{group['loss']:.3f} nats, 95 % {low:.3f} to {high:.3f}"),
            ("Loss on images seen", f"{group['train_loss']:.3f} nats"),
            ("KL(q(z|x) ‖ p(z))", f"{group['kl']:.2f} nats"),
        ]
    return rows


def _combined(record: dict[str, Any]) -> Rows:
    """The priors that one was combined from, with what each wins in the ELBO."""
    rows = [
        (part["name"], f"weight {part['weight']:.2f}; alone {_nats(part)} over the VAE’s prior")
        for part in record["combined"]
    ]
    more = f"{_nats(record['bound'])}; {_nats(record['gain'])} more than the best alone"
    return [*rows, ("Together", more), ("Images that chose", f"{record['heldout_images']:,}")]


def _nats(won: dict[str, float]) -> str:
    return f"{won['value']:.3f} ± {won['se']:.3f} nats"


def tables(
    run: Run, vae: Any, prior: NoiseContrastivePrior | None, data: ImageDataset
) -> list[tuple[str, Rows]]:
    """Titled tables of everything that made this run."""
    found = [("Data", _data(run, data)), ("VAE", _vae(vae))]
    if prior is not None:
        found.append(("Noise contrastive prior", _prior(prior)))
    found.append(("Recipe", _recipe(run)))
    return found


def _data(run: Run, data: ImageDataset) -> Rows:
    c, h, w = data.image_shape
    if data.binarize is None:
        binarized = "no"
    else:
        dynamic = data.binarize == "dynamic"
        binarized = "anew at every pass" if dynamic else f"once, with seed {data.binarize}"
    rows = [
        ("Name", data.name),
        ("Images", f"{len(data):,} of {h} × {w}, {'grey' if c == 1 else 'RGB'}"),
        ("Binarised", binarized),
        ("Mirrored at random", "yes" if data.flip else "no"),
    ]
    sizes = {name: len(part) for name, part in run.read_splits().items()}
    labels = {"fit": "of train, to fit the prior", "heldout": "of train, held out of that fit"}
    rows += [(labels.get(name, name).capitalize(), f"{n:,}") for name, n in sizes.items()]
    return rows


def _vae(vae: Any) -> Rows:
    rows = [
        ("Class", type(vae).__name__),
        ("Latent groups", str(vae.num_groups)),
        ("Parameters", f"{_parameters(vae):,}"),
        ("Likelihood", type(vae.likelihood).__name__ if hasattr(vae, "likelihood") else ""),
    ]
    config = getattr(vae, "config", None) or {}
    rows += [(_label(k), describe(v)) for k, v in config.items() if k != "likelihood"]
    return [(name, value) for name, value in rows if value]


def _prior(prior: NoiseContrastivePrior) -> Rows:
    record = prior.record
    rows = [
        ("Base", base_name(prior) or "the VAE’s own"),
        ("Parameters", f"{_parameters(prior.ratios):,}"),
    ]
    for name, value in record["settings"].items():
        options = value.items() if isinstance(value, dict) else [(name, value)]
        rows += [(_label(k), describe(v)) for k, v in options]
    return [*rows, ("Seed", str(record["seed"]))]


def _recipe(run: Run) -> Rows:
    rows = [
        (f"[{section}] {name}", describe(value))
        for section, values in run.config.items()
        if isinstance(values, dict)
        for name, value in values.items()
    ]
    return rows or [("All settings", "defaults")]


def recipe_text(run: Run) -> str:
    """The recipe as TOML, to be used again."""
    import tomli_w

    return tomli_w.dumps({k: v for k, v in run.config.items() if isinstance(v, dict)}).strip()


def _label(name: str) -> str:
    return name.replace("_", " ").capitalize()


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
