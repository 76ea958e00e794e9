"""The plots of the report as inline SVG, whose colours and font are those of the page around them.

They are drawn with matplotlib's `Figure`, never pyplot. Colours are written as CSS variables, so
that the same plot is right in light and in dark mode.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ncprior.figures import VAE_PRIOR, Figures
from ncprior.ratios.nce import LOG_2

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# CSS variable of the page: the colour that matplotlib draws with.
COLORS = {
    "ink": "#1c2127",
    "soft": "#5d6672",
    "line": "#dcdfe2",
    "data": "#4a5563",
    "reconstruction": "#007a5c",
    "base": "#c4500c",
    "ncp": "#0a63ac",
    VAE_PRIOR: "#9a2f6b",
}
SIZE = (5.6, 3.2)  # inches of 72 units; about as wide as a phone, so that text stays legible there
History = list[dict[str, float]]
GROUP_LOSS = re.compile(r"heldout_loss_\d+")


class Plot(NamedTuple):
    """A plot with its words."""

    title: str
    svg: str
    keys: list[tuple[str, str, str]]  # label, colour and kind ("line", "dash", "fill", "dot")
    note: str = ""


def elbo(history: History) -> Plot:
    """ELBO of training batches and validation images by step."""
    figure, axes = new_axes("step", "ELBO (nats per image)")
    _line(axes, history, "elbo", "soft")
    _line(axes, history, "validation_elbo", "reconstruction")
    settled = [
        row[name]
        for row in _after_start(history)
        for name in ("elbo", "validation_elbo")
        if name in row
    ]
    note = ""
    if settled and len(settled) > 4:
        low, high = min(settled), max(settled)
        axes.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.12 * (high - low) + 1e-9)
        note = "The axis is fitted to what comes after the first tenth of the steps. "
    keys = [("training", "soft", "line"), ("validation", "reconstruction", "line")]
    note += "Higher is better; a wide gap between the two curves is over-fitting."
    return Plot("Stage 1: ELBO of the VAE", as_svg(figure, "elbo", "ELBO by step"), keys, note)


def kl(history: History) -> Plot:
    """KL(q(z|x) || p(z)) by step."""
    figure, axes = new_axes("step", "KL (nats per image)")
    _line(axes, history, "kl", "soft")
    axes.set_ylim(bottom=0)
    return Plot(
        "Stage 1: KL(q(z|x) ‖ p(z))",
        as_svg(figure, "kl", "KL by step"),
        [("training", "soft", "line")],
        "Nats that the latents carry about an image. Near 0 the posteriors have collapsed.",
    )


def nce(history: History, best_step: int | None) -> Plot:
    """NCE loss by step, with its ceiling and the step that was kept."""
    figure, axes = new_axes("step", "NCE loss (nats)")
    ceiling = 2 * LOG_2
    axes.axhline(ceiling, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    _line(axes, history, "train_loss", "soft")
    _line(axes, history, "heldout_loss", "ncp")
    axes.set_ylim(0, 1.1 * ceiling)
    kept = [row for row in history if row["step"] == best_step and "heldout_loss" in row]
    for row in kept:
        axes.plot(
            [row["step"]], [row["heldout_loss"]], "o", color=COLORS["ncp"], markersize=6, zorder=5
        )
        axes.axvline(row["step"], color=COLORS["ncp"], linewidth=0.8, linestyle=(0, (1, 2)))
    keys = [
        ("training", "soft", "line"),
        ("held out", "ncp", "line"),
        ("2 log 2: no hole", "ink", "dash"),
    ] + [(f"kept, step {best_step:,}", "ncp", "dot") for _ in kept]
    return Plot(
        "Stage 2: loss of the classifier",
        as_svg(figure, "nce", "NCE loss by step"),
        keys,
        "A classifier that cannot tell posterior from prior stays at 2 log 2. The further the "
        "held-out curve falls below it, the larger the hole.",
    )


def nce_of_groups(histories: Sequence[History]) -> Plot:
    """Held-out NCE loss of each latent group by step, from one training log or several."""
    figure, axes = new_axes("step", "held-out NCE loss (nats)")
    ceiling = 2 * LOG_2
    axes.axhline(ceiling, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    for history in histories:
        names = sorted({name for row in history for name in row if GROUP_LOSS.fullmatch(name)})
        for name in names or ["heldout_loss"]:
            _line(axes, history, name, "ncp", width=1.0)
    axes.set_ylim(0, 1.1 * ceiling)
    return Plot(
        "Stage 2: losses of the classifiers",
        as_svg(figure, "nce", "Held-out NCE loss of each latent group by step"),
        [("held out, a line for each group", "ncp", "line"), ("2 log 2: no hole", "ink", "dash")],
        "Each group keeps the weights of its own lowest loss. A classifier that cannot tell "
        "posterior from prior stays at 2 log 2.",
    )


def log_ratios(group: dict[str, Any], k: int | None = None) -> Plot:
    """Densities of log r under q(z) and under p(z), from a prior's record.

    Args:
        group: The record of one latent group.
        k: Its number where there are several.
    """
    figure, axes = new_axes("log r(z) (nats)", "density")
    found = group["histogram"]
    for name, color in (("p", "base"), ("q", "reconstruction")):
        axes.stairs(found[name], found["edges"], fill=True, color=COLORS[color], alpha=0.22)
        axes.stairs(found[name], found["edges"], color=COLORS[color], linewidth=1.6)
    axes.axvline(0, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(bottom=0)
    keys = [
        ("under q(z), held out", "reconstruction", "fill"),
        ("under p(z)", "base", "fill"),
        ("r = 1", "ink", "dash"),
    ]
    note = (
        f"Calibrated on held-out draws: temperature {group['temperature']:.3f}, "
        f"shift {_signed(group['shift'])} nats; 1 and 0 would change nothing. Without a hole the "
        "two would lie upon each other, at 0."
    )
    label = "" if k is None else f", group {k}"
    drawn = as_svg(figure, f"ratios{k or ''}", "Histogram of log r under q and p")
    return Plot(f"log r under posterior and prior{label}", drawn, keys, note)


def ess(values: Sequence[float], proposals: int, k: int | None = None) -> Plot:
    """Histogram of the effective size of SIR's pools, one for each draw."""
    figure, axes = new_axes(f"effective proposals of {proposals:,}", "draws")
    mean = sum(values) / len(values)
    top = max(*values, 1.0) * 1.04
    bins = min(20, max(6, round(math.sqrt(len(values)) * 2)))
    edges = [top * i / bins for i in range(bins + 1)]
    axes.hist(values, edges, color=COLORS["ncp"], alpha=0.3, edgecolor="none")
    axes.hist(values, edges, color=COLORS["ncp"], histtype="step", linewidth=1.6)
    axes.axvline(mean, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, top)
    keys = [("draws of the NCP", "ncp", "fill"), (f"mean {mean:.1f}", "ink", "dash")]
    note = (
        f"On average {mean:.1f} of {proposals:,} proposals count, {100 * mean / proposals:.2g} % "
        f"(least {min(values):.1f}, most {max(values):.1f}). Below 3 a draw is little more than "
        "the best of its pool."
    )
    label = "" if k is None else f", group {k}"
    drawn = as_svg(figure, f"ess{k or ''}", "Histogram of effective sample sizes")
    return Plot(f"Effective sample size of SIR{label}", drawn, keys, note)


def frechet(figures: Figures) -> Plot:
    """The Frechet distances on one line each, with 95 % bars."""
    labels = {VAE_PRIOR: "VAE's own prior", "base": "base", "ncp": "NCP"}
    labels = {k: v for k, v in labels.items() if f"fd_{k}" in figures}
    labels["reconstruction"] = "reconstruction"
    size = (SIZE[0], 0.6 + 0.5 * len(labels))
    figure, axes = new_axes(f"Frechet distance ({figures['fd_base'].unit})", "", size)
    for row, name in enumerate(labels):
        found, color = figures[f"fd_{name}"], COLORS[name]
        axes.plot([0, found.value], [row, row], color=color, linewidth=1.2, alpha=0.35)
        axes.errorbar(
            [found.value], [row], xerr=[1.96 * (found.se or 0)], fmt="o", color=color,
            markersize=7, elinewidth=2.2, capsize=0,
        )  # fmt: skip
    axes.set_yticks(range(len(labels)), list(labels.values()))
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_xlim(left=0)
    axes.grid(False, axis="y")
    axes.grid(True, axis="x", color=COLORS["line"], linewidth=0.8)
    axes.tick_params(axis="y", labelcolor=COLORS["ink"])
    return Plot(
        "Distance to the test images",
        as_svg(figure, "frechet", "Frechet distances of base, NCP and reconstructions"),
        [],
        "Lower is better; bars are 95 %. The reconstructions are what a perfect prior would reach, "
        f"so the way from {next(iter(labels.values()))} to reconstruction is the gap that can be "
        "closed.",
    )


def new_axes(xlabel: str, ylabel: str, size: tuple[float, float] = SIZE) -> "tuple[Figure, Axes]":
    """An empty plot in the look of the page."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLORS["soft"])
    axes.tick_params(colors=COLORS["soft"], labelsize=11, length=0, pad=5)
    axes.tick_params(axis="x", length=4)
    axes.set_xlabel(xlabel, color=COLORS["soft"], fontsize=11)
    axes.set_ylabel(ylabel, color=COLORS["soft"], fontsize=11)
    axes.grid(True, axis="y", color=COLORS["line"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.locator_params(axis="y", nbins=6)
    axes.locator_params(axis="x", nbins=6)
    return figure, axes


def _line(axes: "Axes", history: History, name: str, color: str, width: float = 1.8) -> None:
    points = [(row["step"], row[name]) for row in history if name in row]
    if points:
        marker = "o" if len(points) == 1 else ""
        axes.plot(*zip(*points, strict=True), color=COLORS[color], linewidth=width, marker=marker)


def _after_start(history: History) -> History:
    return [row for row in history if row["step"] > 0.1 * history[-1]["step"]]


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")


def as_svg(figure: "Figure", name: str, label: str) -> str:
    """The figure as an <svg> to be put into a page; `name` keeps its ids apart from others'."""
    import matplotlib

    content = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", transparent=True, metadata=nothing)
    text = content.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    width, height = figure.get_size_inches() * 72
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r' id="', f' id="{name}-', body)
    body = body.replace("url(#", f"url(#{name}-").replace('xlink:href="#', f'href="#{name}-')
    for variable, color in COLORS.items():
        body = body.replace(color, f"var(--{variable})")
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{label}">{body}'
