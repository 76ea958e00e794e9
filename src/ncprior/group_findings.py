"""What was found about each latent group: which are mended, and which ratios are unreliable."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from ncprior.figures import Figure, Figures
from ncprior.group_figures import NAMES
from ncprior.groups import spell_groups
from ncprior.priors import NoiseContrastivePrior
from ncprior.training.verdict import COLLAPSED_KL, OVERFIT_SHARE, SEPARATED_JSD

FEW_PROPOSALS = 3  # effective ones; with fewer a draw is little more than the best of its pool
USUAL_PROPOSALS = 1000  # SIR's pool where none was drawn yet
NO_JSD = 0.005  # nats; a hole that small shows nowhere
SMALL_JSD = 0.05
STRONG_OVERFIT_SHARE = 0.3  # of the held-out loss
SIGNIFICANT = 2  # standard errors

WORDS = {
    "mended": "the gap to the posterior falls by more than half",
    "improved": "the gap falls, by less than half",
    "unchanged": "the NCP's gap is not 0, and not clearly below that of the base prior",
    "worse": "the gap grows",
    "hole": "the classifier tells posterior from prior; what was mended is not measured yet",
    "no hole": f"the JSD is below {NO_JSD} within its error",
    "unclear": "the errors are too large to say",
    "unreliable": f"fewer than {FEW_PROPOSALS} effective proposals, almost perfect separation or "
    "strong over-fitting",
    "inactive": f"KL below {COLLAPSED_KL} nats: the posterior is the prior",
    "not fitted": "keeps its base prior",
}
"""The verdict on a group, and what it means."""


class GroupFinding(NamedTuple):
    """One latent group: its figures, by `NAMES` without a number, and a word of `WORDS`."""

    group: int
    shape: tuple[int, ...] | None  # of its latents; None where it has no ratio
    figures: Figures
    word: str


def group_findings(prior: NoiseContrastivePrior, figures: Figures) -> list[GroupFinding]:
    """What the prior's record and measured figures say of each group."""
    found = []
    for k, record in enumerate(prior.record["groups"]):
        own = {name: figures[f"{name}_{k}"] for name in NAMES if f"{name}_{k}" in figures}
        shape = getattr(prior.ratios[k], "latent_shape", None)
        word = judge(record if k in prior.fitted_groups else None, own)
        found.append(GroupFinding(k, shape, own, word))
    return found


def judge(record: dict[str, Any] | None, measured: Figures) -> str:
    """The word for a group, the first that holds of: not fitted, inactive, unreliable, the rest.

    Args:
        record: What the fit recorded of it; None if it has no ratio.
        measured: Its figures by `NAMES`. Without "ess" the pools are supposed to hold 1000
            proposals; without the gaps (or MMDs, where there are no gaps) it is not known what was
            mended.
    """
    if record is None:
        return "not fitted"
    if record["kl"] < COLLAPSED_KL:
        return "inactive"
    effective = record["ess_share"] * USUAL_PROPOSALS
    if "ess" in measured:
        effective = measured["ess"].value
    overfit = record["loss"] - record["train_loss"] > STRONG_OVERFIT_SHARE * record["loss"]
    if effective < FEW_PROPOSALS or record["jsd"] > SEPARATED_JSD or overfit:
        return "unreliable"
    low, high = record["jsd_interval"]
    without = "hole" if low > NO_JSD else "no hole" if high < SMALL_JSD else "unclear"
    kind = next((kind for kind in ("gap", "mmd") if f"{kind}_gain" in measured), None)
    if kind is None:
        return without
    base, ncp, gain = (measured[f"{kind}_{name}"] for name in ("base", "ncp", "gain"))
    if gain.value > SIGNIFICANT * (gain.se or 0):
        return "mended" if 2 * abs(ncp.value) < base.value else "improved"
    if gain.value < -SIGNIFICANT * (gain.se or 0):
        return "worse"
    size = abs(ncp.value) if kind == "gap" else ncp.value
    if size > SIGNIFICANT * (ncp.se or 0):
        return "unchanged"
    return "unclear" if without == "hole" else without


def group_table(findings: Sequence[GroupFinding]) -> Any:
    """A rich table with a line for each group; gaps only where they were measured."""
    from rich import box
    from rich.table import Table

    measured = any("gap_base" in found.figures for found in findings)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    heads = ["group", "latent", "KL\nnats", "held-out loss\n95 %", "JSD\nnats", "ESS\nshare"]
    heads += ["gap, s.d.\nq to base", "\nq to NCP"] if measured else []
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for found in findings:
        cells = [str(found.group), shape_text(found), *figure_texts(found)]
        table.add_row(*cells[: len(heads)], found.word)
    return table


def figure_texts(found: GroupFinding, dash: str = "-") -> list[str]:
    """KL, held-out loss with its interval, JSD, ESS share and both gaps, as people read them."""
    loss = found.figures.get("nce_loss")
    share = found.figures.get("ess_share")
    return [
        f"{found.figures['kl'].value:.2f}" if "kl" in found.figures else dash,
        f"{loss.value:.3f} {loss.error()}" if loss else dash,
        f"{found.figures['jsd'].value:.3f}" if "jsd" in found.figures else dash,
        _percent(share, dash),
        *(_with_error(found.figures.get(f"gap_{name}"), dash) for name in ("base", "ncp")),
    ]


def shape_text(found: GroupFinding, dash: str = "-") -> str:
    """The shape of a group's latents, such as 20x8x8."""
    return dash if found.shape is None else "x".join(str(n) for n in found.shape)


def words_in_short(findings: Sequence[GroupFinding]) -> str:
    """Which groups got which word, such as "Mended: groups 0-2. Unreliable: group 4."."""
    by_word = {word: [f.group for f in findings if f.word == word] for word in WORDS}
    said = [f"{word}: {name_groups(groups)}" for word, groups in by_word.items() if groups]
    return " ".join(f"{text[0].upper()}{text[1:]}." for text in said)


def name_groups(groups: Iterable[int]) -> str:
    """ "group 3" or "groups 3-5,7"."""
    groups = list(groups)
    return f"group{'s' if len(groups) > 1 else ''} {spell_groups(groups)}"


def merged_warnings(prior: NoiseContrastivePrior, findings: Sequence[GroupFinding]) -> list[str]:
    """What a user should know before trusting ratios of several groups, a line for each kind.

    Groups that are merely inactive are no reason for one; see `inactive_note`.
    """
    fitted = _fitted(prior)
    separated = [k for k, g in fitted.items() if g["jsd"] > SEPARATED_JSD]
    excess = {k: g["loss"] - g["train_loss"] for k, g in fitted.items() if k not in separated}
    overfit = [k for k, gap in excess.items() if gap > OVERFIT_SHARE * fitted[k]["loss"]]
    sizes = {f.group: f.figures["ess"].value for f in findings if "ess" in f.figures}
    few = [k for k, size in sizes.items() if size < FEW_PROPOSALS]
    found = []
    if len(_inactive(prior)) == len(prior.ratios):
        found.append(
            f"all latent groups have collapsed: KL below {COLLAPSED_KL} nats each, so that "
            "posteriors equal the prior. There is no hole to mend. Train the VAE with a KL warm-up "
            "or a narrower likelihood."
        )
    if separated:
        found.append(
            f"{name_groups(separated)}: the classifier separates almost perfectly (JSD up to "
            f"{max(fitted[k]['jsd'] for k in separated):.3f}): prior and posterior hardly overlap "
            "and the ratios are not to be trusted. Leave them to their base prior (groups = ...), "
            "or train the VAE with a larger KL weight or a wider likelihood."
        )
    if overfit:
        worst = max(overfit, key=excess.__getitem__)
        found.append(
            f"{name_groups(overfit)}: the classifier over-fits (most in group {worst}: loss "
            f"{fitted[worst]['train_loss']:.3f} on images it was fitted on, "
            f"{fitted[worst]['loss']:.3f} on held-out ones). It was stopped where the held-out "
            "loss was lowest and then calibrated; more images or dropout would help."
        )
    if few:
        found.append(
            f"{name_groups(few)}: SIR's pools hold fewer than {FEW_PROPOSALS} effective proposals, "
            "so that draws repeat the few best. Raise proposals, or leave these groups to their "
            "base prior (groups = ...)."
        )
    return [text[0].upper() + text[1:] for text in found]


def inactive_note(prior: NoiseContrastivePrior) -> list[str]:
    """A line on groups that carry nothing, where others do."""
    inactive = _inactive(prior)
    if not inactive or len(inactive) == len(prior.ratios):
        return []
    named = name_groups(inactive).capitalize()
    return [
        f"{named}: inactive (KL below {COLLAPSED_KL} nats), so that posterior and prior are the "
        "same. This is common in hierarchical VAEs and does no harm."
    ]


def _fitted(prior: NoiseContrastivePrior) -> dict[int, dict[str, Any]]:
    """The records of the groups that were fitted."""
    return {k: group for k, group in enumerate(prior.record["groups"]) if group is not None}


def _inactive(prior: NoiseContrastivePrior) -> list[int]:
    return [k for k, group in _fitted(prior).items() if group["kl"] < COLLAPSED_KL]


def _percent(figure: Figure | None, dash: str) -> str:
    if figure is None:
        return dash
    return f"{100 * figure.value:.{1 if figure.value > 0.01 else 2}f} %"


def _with_error(figure: Figure | None, dash: str) -> str:
    """A figure and its error, in hundredths: all that a gap is good for."""
    return dash if figure is None else f"{figure.value:.2f} ± {figure.se or 0:.2f}"
