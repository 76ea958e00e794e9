"""The section on latent groups, of a run whose VAE has several."""

from collections.abc import Sequence
from typing import NamedTuple

from ncprior.figures import Figures
from ncprior.generation import Draws
from ncprior.group_figures import ess_figures
from ncprior.group_findings import WORDS, GroupFinding, figure_texts, group_findings, shape_text
from ncprior.priors import NoiseContrastivePrior
from ncprior.report import group_plots
from ncprior.report.plots import Plot

COLORS = {"mended": "reconstruction", "improved": "reconstruction", "no hole": "reconstruction"}
COLORS |= {"hole": "base", "unchanged": "base", "worse": "warn", "unreliable": "warn"}


class Row(NamedTuple):
    """A line of the table."""

    group: int
    shape: str
    cells: list[str]  # KL, held-out loss, JSD, ESS share, and gaps where they were measured
    word: str
    color: str


class Section(NamedTuple):
    """What is shown of latent groups."""

    rows: list[Row]
    meanings: list[tuple[str, str]]  # of the words in the table
    measured: bool  # whether there are gaps
    note: str
    plots: list[Plot]
    ratios: group_plots.Small | None


def findings_of(
    prior: NoiseContrastivePrior, known: Figures, drawn: Draws, proposals: int, seed: int
) -> list[GroupFinding]:
    """What is known of each group; ESS from the images of this page where it was not measured."""
    pools: Figures = {}
    if not any(f"ess_{k}" in known for k in range(prior.num_groups)):
        for k in prior.fitted_groups:
            pools |= ess_figures(k, drawn.ess[k], proposals, seed)
    return group_findings(prior, pools | known)


def section(prior: NoiseContrastivePrior, findings: Sequence[GroupFinding]) -> Section:
    """The table, what its words mean, and the plots."""
    fitted = [f for f in findings if "nce_loss" in f.figures]
    measured = any("gap_base" in f.figures for f in findings)
    seen = {f.word for f in findings}
    plots = [group_plots.losses(findings)]
    if any("ess_share" in f.figures for f in fitted):
        plots.append(group_plots.ess_by_loss(findings))
    plots.append(group_plots.jsds(findings))
    if measured:
        plots.append(group_plots.gaps(findings))
    if any("mmd_base" in f.figures for f in findings):
        plots.append(group_plots.mmds(findings))
    records = [(f.group, prior.record["groups"][f.group]) for f in fitted if f.word != "inactive"]
    return Section(
        [_row(found, measured) for found in findings],
        [(word, meaning) for word, meaning in WORDS.items() if word in seen],
        measured,
        _note(findings),
        plots,
        group_plots.small_log_ratios(records) if records else None,
    )


def _row(found: GroupFinding, measured: bool) -> Row:
    cells = figure_texts(found, dash="–")[: 6 if measured else 4]
    shape = shape_text(found, dash="–").replace("x", " × ")
    return Row(found.group, shape, cells, found.word, COLORS.get(found.word, "soft"))


def _note(findings: Sequence[GroupFinding]) -> str:
    """How many images and proposals are behind the table."""
    said = []
    for found in findings:
        if "ess_share" in found.figures:
            figure = found.figures["ess_share"]
            said.append(f"ESS: {figure.note} for {figure.samples:,} draws.")
            break
    for found in findings:
        if "gap_base" in found.figures:
            said.append(f"Gaps: {found.figures['gap_base'].samples:,} test images, ± s.e.")
            break
    return " ".join(said)
