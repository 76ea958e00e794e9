"""Plots by latent group: held-out loss, ESS against loss, JSD, MMD, and log r in small."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ncprior.figures import Figure as Measured
from ncprior.group_findings import GroupFinding
from ncprior.ratios.nce import LOG_2
from ncprior.report.plots import COLORS, SIZE, Plot, as_svg, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = (2.5, 1.35)  # inches, of one of many small plots
APART = 14  # points of 1/72 inch from a marker to the middle of its number


class Small(NamedTuple):
    """Many small plots of one kind under a title."""

    title: str
    plots: list[tuple[str, str]]  # label and svg
    keys: list[tuple[str, str, str]]
    note: str


def losses(findings: Sequence[GroupFinding]) -> Plot:
    """Held-out loss of each group with its 95 % interval (Fig. 5a of the paper)."""
    figure, axes = _by_group(findings, "held-out NCE loss (nats)")
    ceiling = 2 * LOG_2
    axes.axhline(ceiling, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    found = [(f.group, f.figures["nce_loss"]) for f in findings if "nce_loss" in f.figures]
    _points(axes, found, "ncp")
    axes.set_ylim(0, 1.1 * ceiling)
    return Plot(
        "Held-out loss by group",
        as_svg(figure, "group-losses", "Held-out NCE loss by latent group"),
        [("held out, with 95 %", "ncp", "dot"), ("2 log 2: no hole", "ink", "dash")],
        "The nearer to 2 log 2, the more alike are posterior and prior of the group.",
    )


def ess_by_loss(findings: Sequence[GroupFinding]) -> Plot:
    """Share of SIR's proposals that count, against the loss (Fig. 5b of the paper)."""
    both = ("nce_loss", "ess_share")
    found = [f for f in findings if {*both} <= {*f.figures}]
    figure, axes = new_axes("held-out NCE loss (nats)", "effective share of proposals (%)")
    axes.axvline(2 * LOG_2, color=COLORS["ink"], linewidth=1, linestyle=(0, (4, 3)))
    x = [f.figures["nce_loss"].value for f in found]
    y = [100 * f.figures["ess_share"].value for f in found]
    axes.plot(x, y, "o", color=COLORS["ncp"], markersize=6)
    axes.set_yscale("log")
    axes.set_ylim(min(10.0, 0.5 * min(y)), 160)
    axes.set_xlim(max(0.0, min(x) - 0.15), 2 * LOG_2 + 0.08)
    ticks = [t for t in (0.01, 0.1, 1, 10, 100) if t >= axes.get_ylim()[0]]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks], minor=False)
    axes.minorticks_off()
    _number(axes, x, y, [f.group for f in found])
    return Plot(
        "Effective sample size against loss",
        as_svg(figure, "group-ess", "Effective share of SIR's proposals against held-out loss"),
        [("groups, by number", "ncp", "dot"), ("2 log 2: no hole", "ink", "dash")],
        "Where the loss is low few proposals count, and SIR is less reliable.",
    )


def jsds(findings: Sequence[GroupFinding]) -> Plot:
    """JSD of each group with its 95 % interval."""
    figure, axes = _by_group(findings, "JSD (nats)")
    found = [(f.group, f.figures["jsd"]) for f in findings if "jsd" in f.figures]
    _bars(axes, found, "base", 0.0, 0.7)
    axes.set_ylim(0, min(1.08 * LOG_2, max(0.02, *(1.15 * _ends(x)[1] for _, x in found))))
    return Plot(
        "Size of the hole by group",
        as_svg(figure, "group-jsd", "JSD between posterior and base prior by latent group"),
        [("JSD of posterior and base prior, with 95 %", "base", "fill")],
        f"0 without a hole, {LOG_2:.3f} at most. It says how large a hole is, not whether it shows "
        "in the images: the first groups matter most to those.",
    )


def gaps(findings: Sequence[GroupFinding]) -> Plot:
    """Gaps of the witnesses from the posterior to base prior and to NCP, with 95 %."""
    figure, axes = _by_group(findings, "gap, s.d.")
    axes.axhline(0, color=COLORS["soft"], linewidth=0.8)
    for name, color, shift in (("gap_base", "base", -0.2), ("gap_ncp", "ncp", 0.2)):
        found = [(f.group, f.figures[name]) for f in findings if name in f.figures]
        _bars(axes, found, color, shift, 0.38)
    return Plot(
        "Gap to the posterior by group",
        as_svg(figure, "group-gap", "Gap from posterior to base prior and to NCP by latent group"),
        [("base prior, with 95 %", "base", "fill"), ("NCP", "ncp", "fill")],
        "How far apart posterior and prior are, given the same groups before, along a function "
        "that was found on training images between posterior and base; in its standard "
        "deviations, on test images. At 0 nothing is left of it; below 0 the NCP goes too far.",
    )


def mmds(findings: Sequence[GroupFinding]) -> Plot:
    """MMD^2 from the posterior to base prior and to NCP, with 95 % (Table 9 of the paper)."""
    figure, axes = _by_group(findings, "MMD² × 1000")
    axes.axhline(0, color=COLORS["soft"], linewidth=0.8)
    for name, color, shift in (("mmd_base", "base", -0.2), ("mmd_ncp", "ncp", 0.2)):
        found = [(f.group, _scaled(f.figures[name])) for f in findings if name in f.figures]
        _bars(axes, found, color, shift, 0.38)
    return Plot(
        "Distance to the posterior by group",
        as_svg(figure, "group-mmd", "MMD from posterior to base prior and to NCP by latent group"),
        [("base prior, with 95 %", "base", "fill"), ("NCP", "ncp", "fill")],
        "MMD² between draws of the posterior and of base prior or NCP, given the same groups "
        "before. Lower is better; the estimate is unbiased, so that it may fall below 0. Longer "
        "latents were projected onto 500 principal components at most.",
    )


def small_log_ratios(records: Sequence[tuple[int, dict[str, Any]]]) -> Small:
    """Densities of log r under q and p, a small plot for each group, from a prior's record."""
    return Small(
        "log r under posterior and prior",
        [(f"group {k}", _small_histogram(k, record["histogram"])) for k, record in records],
        [
            ("under q(z), held out", "reconstruction", "fill"),
            ("under p(z)", "base", "fill"),
            ("r = 1", "ink", "dash"),
        ],
        "In nats, calibrated on held-out draws. Without a hole both are a peak at 0; ratios are "
        "unreliable where the two hardly overlap. Axes differ, and show 1 nat at least either way.",
    )


def _small_histogram(k: int, found: dict[str, list[float]]) -> str:
    figure, axes = new_axes("", "", size=SMALL)
    for name, color in (("p", "base"), ("q", "reconstruction")):
        axes.stairs(found[name], found["edges"], fill=True, color=COLORS[color], alpha=0.22)
        axes.stairs(found[name], found["edges"], color=COLORS[color], linewidth=1.2)
    axes.axvline(0, color=COLORS["ink"], linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xlim(min(-1.0, found["edges"][0]), max(1.0, found["edges"][-1]))
    axes.set_ylim(bottom=0)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(labelsize=10, pad=3)
    return as_svg(figure, f"small-ratios{k}", f"Histogram of log r under q and p, group {k}")


def _by_group(findings: Sequence[GroupFinding], label: str) -> Any:
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_axes("latent group", label)
    axes.set_xlim(-0.6, len(findings) - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
    return figure, axes


def _points(axes: "Axes", found: Sequence[tuple[int, Measured]], color: str) -> None:
    for k, figure in found:
        low, high = _ends(figure)
        axes.plot([k, k], [low, high], color=COLORS[color], linewidth=2.0)
        axes.plot([k], [figure.value], "o", color=COLORS[color], markersize=6)


def _bars(
    axes: "Axes", found: Sequence[tuple[int, Measured]], color: str, shift: float, width: float
) -> None:
    for k, figure in found:
        low, high = _ends(figure)
        axes.bar([k + shift], [figure.value], width, color=COLORS[color], alpha=0.35)
        axes.plot([k + shift] * 2, [low, high], color=COLORS[color], linewidth=2.0)


def _ends(figure: Measured) -> tuple[float, float]:
    """Both ends of the 95 % interval."""
    if figure.interval is not None:
        return figure.interval
    return figure.value - 1.96 * (figure.se or 0), figure.value + 1.96 * (figure.se or 0)


def _scaled(figure: Measured) -> Measured:
    return figure._replace(value=1000 * figure.value, se=1000 * (figure.se or 0))


def _number(axes: "Axes", x: Sequence[float], y: Sequence[float], groups: Sequence[int]) -> None:
    """Numbers beside points where there is room for them, clear of points and other numbers."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    width, height = 72 * SIZE[0], 72 * SIZE[1]
    points = [
        (width * (a - left) / (right - left), height * math.log(b / low) / math.log(high / low))
        for a, b in zip(x, y, strict=True)
    ]
    taken = list(points)
    for a, b, point, k in zip(x, y, points, groups, strict=True):
        others = [place for place in taken if place != point]
        for right_by, up_by in ((-APART, 0), (APART, 0), (0, APART), (0, -APART)):
            place = (point[0] + right_by, point[1] + up_by)
            if all(math.dist(place, other) > 0.9 * APART for other in others):
                axes.annotate(
                    str(k), (a, b), (right_by, up_by), textcoords="offset points", ha="center",
                    va="center", fontsize=11, color=COLORS["ink"],
                )  # fmt: skip
                taken.append(place)
                break
