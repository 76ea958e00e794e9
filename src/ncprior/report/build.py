"""Draw what the report shows, and write the page."""

import base64
import re
import struct
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior import __version__
from ncprior.data import ImageDataset, Splits
from ncprior.diagnosis import held_out_figures
from ncprior.figures import VAE_PRIOR
from ncprior.generation import Draws, draw
from ncprior.group_figures import overall
from ncprior.group_samples import group_samples
from ncprior.latent_figures import log_ratios_on_test_images
from ncprior.metrics.calibration import reliability
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.report import compared, facts, latent_plots, latents, plots, words
from ncprior.report.nearest import beside_nearest
from ncprior.report.pictures import grid
from ncprior.report.reliability import reliability_plot
from ncprior.runs import Run
from ncprior.sources import training_images
from ncprior.storage import write_bytes

COLUMNS = 8
NEIGHBOURS = 5  # of each sample that is shown beside training images
BESIDE = 8  # such samples
BINS = 15  # of the reliability plot
Curves = dict[str, plots.History]  # by stage, "vae" and "ncp"


class Picture(NamedTuple):
    """A grid of images."""

    name: str  # also the colour
    title: str
    caption: str
    source: str  # a data: address
    width: int  # pixels
    height: int


def write_report(run: Run, *, num: int = 64, proposals: int = 1000, seed: int = 0) -> Path:
    """Write `report.html` into a run: one file with everything in it, for screen and paper.

    It shows what the run holds: a run without a prior or without measurements gives a shorter
    report, which says what to do next.

    Args:
        run: A run with a trained VAE.
        num: Images in each of the four grids; as many as there are test images at most.
        proposals: SIR's pool for each NCP sample.
        seed: Seed of what is drawn.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: the run has no trained VAE yet.
        ValueError: a count below 1, or a prior that was fitted on another VAE.
    """
    if num < 1 or proposals < 1:
        raise ValueError(f"num and proposals must be at least 1, got {num=}, {proposals=}")
    vae = run.load_vae()
    prior = run.load_prior(vae) if run.has_prior else None
    data, splits = run.load_data()
    images, drawn = _draw(vae, prior, data, splits, num, proposals, seed)
    page = _render(_content(run, vae, prior, data, splits, images, drawn, proposals, seed))
    path = run.path / "report.html"
    write_bytes(path, page.encode())
    return path


def _draw(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset,
    splits: Splits,
    num: int,
    proposals: int,
    seed: int,
) -> tuple[dict[str, Tensor], Draws | None]:
    """Images by name, and the draws of the noise contrastive prior."""
    order = torch.randperm(len(splits.test), generator=stream(seed, "report test images"))
    num = min(num, len(order))
    images = {"data": data.raw(splits.test[order[:num]])}
    # More would be the same law, and a large data set need not be read for it.
    some = torch.randperm(len(splits.train), generator=stream(seed, "report training images"))
    rows = splits.train[some[: 10 * num]]
    seen = training_images(data, splits._replace(train=rows), seed)
    images["reconstruction"] = draw(vae, None, num, images=seen, seed=seed).images
    if prior is not None and prior.has_other_base(vae):
        images[VAE_PRIOR] = draw(vae, None, num, seed=seed).images
    else:
        under = vae if prior is None else prior.under(vae)
        images["base"] = draw(under, None, num, seed=seed).images
    if prior is None:
        return images, None
    drawn = draw(vae, prior, num, proposals=proposals, seed=seed)
    return images | {"ncp": drawn.images}, drawn


def _content(
    run: Run,
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset,
    splits: Splits,
    images: dict[str, Tensor],
    drawn: Draws | None,
    proposals: int,
    seed: int,
) -> dict[str, Any]:
    """Everything that the template fills in."""
    figures = run.metrics()
    known = (held_out_figures(prior) if prior is not None else {}) | figures
    findings, section, plane, trust = [], None, None, None
    if prior is not None and drawn is not None and prior.num_groups > 1:
        findings = latents.findings_of(prior, known, drawn, proposals, seed)
        section = latents.section(prior, findings)
    elif prior is not None:
        plane = _plane(vae, prior, data, splits, proposals, seed)
        trust = _reliability(vae, prior, data, splits, seed)
    logs = run.path / "logs"
    curves = {stage: facts.read_curves(logs / f"{stage}.csv") for stage in STAGES}
    name = words.shell_name(run)
    return {
        "data_name": data.name,
        "run_name": run.path.resolve().name,
        "version": __version__,
        "made_with": run.config.get("version", ""),
        "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}",
        "shell_name": name,
        "has_prior": prior is not None,
        "verdict": words.verdict_of(figures, known, prior),
        "answers": words.answers_of(known, prior, findings, name),
        "warnings": words.warnings_of(figures, prior, drawn, proposals, name, findings),
        "cards": words.cards(known, findings),
        "missing": words.missing(known),
        "pictures": [_picture(key, images[key], proposals) for key in images],
        "nearest": _nearest(images, data, splits),
        "base_note": words.base_note(vae, prior),
        "columns": COLUMNS,
        "seed": seed,
        "figures": [facts.figure_row(key, figure) for key, figure in overall(figures).items()],
        "groups": section,
        "comparison": compared.section(run.path / "compare"),
        "distances": plots.frechet(figures) if {*DISTANCES} <= {*figures} else None,
        "stage_1": _stage_1(curves["vae"]),
        "stage_2": _stage_2(prior, curves["ncp"], logs),
        "fitted": facts.fitting(prior) if prior is not None else [],
        "ratios": [p for p in (plane, *_ratio_plots(prior, drawn, proposals), trust) if p],
        "facts": facts.tables(run, vae, prior, data),
        "recipe": facts.recipe_text(run),
        "commands": words.commands(name),
    }


STAGES = ("vae", "ncp")
DISTANCES = ("fd_base", "fd_ncp", "fd_reconstruction")


def _picture(name: str, images: Tensor, proposals: int) -> Picture:
    title, caption = words.pictures(proposals)[name]
    return Picture(name, title, f"{len(images)} {caption}", *_png(images, COLUMNS))


def _nearest(images: dict[str, Tensor], data: ImageDataset, splits: Splits) -> Picture:
    """Samples of the NCP, else of the base, each with the training images nearest to it."""
    name = "ncp" if "ncp" in images else "base"
    beside = beside_nearest(images[name][:BESIDE], data, splits.train, NEIGHBOURS)
    num = min(NEIGHBOURS, len(splits.train))
    caption = words.nearest(name, num, len(splits.train))
    return Picture(name, "Nearest training images", caption, *_png(beside, num + 1))


def _png(images: Tensor, columns: int) -> tuple[str, int, int]:
    """A grid of images as a data: address, its width and its height."""
    content = grid(images, columns)
    width, height = struct.unpack(">II", content[16:24])  # where every PNG has them
    return f"data:image/png;base64,{base64.b64encode(content).decode()}", width, height


def _stage_2(
    prior: NoiseContrastivePrior | None, history: plots.History, logs: Path
) -> plots.Plot | None:
    """The losses by step; of several groups those of every part that was fitted."""
    if prior is None or prior.num_groups == 1:
        return plots.nce(history, _best(prior)) if history else None
    parts = [facts.read_curves(file) for file in sorted(logs.glob("ncp*.csv"))]
    return plots.nce_of_groups(parts) if any(parts) else None


def _best(prior: NoiseContrastivePrior | None) -> int | None:
    return None if prior is None else prior.record.get("best_step")


def _stage_1(history: plots.History) -> list[plots.Plot]:
    return [plots.elbo(history), plots.kl(history)] if history else []


def _plane(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    splits: Splits,
    proposals: int,
    seed: int,
) -> plots.Plot | None:
    """Latents of test images, base and NCP; none where there are too few for components."""
    order = torch.randperm(len(splits.test), generator=stream(seed, "report latents"))
    rows, pilot = splits.test[order[: latent_plots.POINTS]], splits.train[:30]
    if len(rows) < 3:
        return None
    pool = min(proposals, 1000)
    drawn = group_samples(vae, prior, data, rows, pilot, proposals=pool, seed=seed)
    return latent_plots.plane(next(drawn)[1])


def _reliability(
    vae: Any, prior: NoiseContrastivePrior, data: ImageDataset, splits: Splits, seed: int
) -> plots.Plot | None:
    """Observed against predicted log-odds on test images; none where these are too few."""
    if len(splits.test) < 2 * BINS:
        return None
    at_q, at_p = log_ratios_on_test_images(vae, prior, data, splits, seed=seed)
    return reliability_plot(reliability(at_q, at_p, BINS))


def _ratio_plots(
    prior: NoiseContrastivePrior | None, drawn: Draws | None, proposals: int
) -> list[plots.Plot]:
    """Of one latent group what log r is like, and how many proposals count."""
    if prior is None or drawn is None or prior.num_groups > 1:
        return []
    (group,) = prior.record.get("groups", [])
    return [plots.log_ratios(group), plots.ess(drawn.ess[0].tolist(), proposals)]


def _render(content: dict[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    here = files("ncprior.report")
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters["minus_sign"] = _minus_sign
    template = environment.from_string((here / "template.html").read_text("utf-8"))
    return template.render(content, css=(here / "style.css").read_text("utf-8"))


def _minus_sign(text: str) -> str:
    """Hyphens before a digit as minus signs."""
    return re.sub(r"(?<![\w-])-(?=\d)", "−", text)
