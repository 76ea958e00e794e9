"""What the report says in words."""

import math
import re
import shlex
from collections.abc import Sequence
from typing import Any, NamedTuple

from ncprior.answers import WITH_HOLE, Answer, answers
from ncprior.diagnosis import verdict
from ncprior.figures import VAE_PRIOR, Figure, Figures
from ncprior.generation import Draws
from ncprior.group_figures import OF_A_GROUP, largest_jsd
from ncprior.group_findings import GroupFinding, merged_warnings
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios.nce import LOG_2
from ncprior.runs import Run

FEW_PROPOSALS = 3

IN_VERDICT = {"How large is the hole?", "What can be won at most?"}


class Card(NamedTuple):
    """A big number."""

    label: str
    value: str
    error: str
    text: str
    share: float | None = None  # of what it could be, for a bar under the number


def shell_name(run: Run) -> str:
    """The run's name as a shell reads it."""
    return shlex.quote(run.path.resolve().name)


def verdict_of(
    measured: Figures,
    known: Figures,
    prior: NoiseContrastivePrior | None,
) -> str:
    """Is the prior broken, and was it mended?

    Args:
        measured: What metrics.json holds.
        known: The same, with what the prior's own record has.
        prior: The prior, if it was fitted.
    """
    if {"fd_base", "fd_ncp", "fd_reconstruction", "gap_closed"} <= {*measured} and _jsd(known):
        return verdict(known)
    if prior is None:
        return (
            "This run has a trained VAE and no noise contrastive prior yet, so nothing has been "
            "measured. The images below are a first look: where base samples are worse than "
            "reconstructions, the prior has a hole."
        )
    found = _jsd(known)
    if found is None:
        return (
            "A noise contrastive prior was fitted. How much nearer its samples are to the data has "
            "not been measured yet."
        )
    k, jsd = found
    which = "Its classifier" if k is None else f"Of its classifiers, that of group {k}"
    how = "" if k is None else " best"
    interval = jsd.interval or (math.nan, math.nan)
    return (
        f"A noise contrastive prior was fitted. {which} tells posterior from prior{how} with a "
        f"JSD of {jsd.value:.3f} nats (95 % {interval[0]:.3f} to {interval[1]:.3f}; 0 without a "
        f"hole, at most {LOG_2:.3f}). How much nearer its samples are to the data has not been "
        f"measured yet."
    )


def answers_of(
    known: Figures,
    prior: NoiseContrastivePrior | None,
    findings: Sequence[GroupFinding],
    name: str,
) -> list[Answer]:
    """What a user asks, but for what the verdict says already."""
    if prior is None:
        return []
    found = answers(prior, known, findings, name)
    return [answer for answer in found if answer.question not in IN_VERDICT]


def warnings_of(
    measured: Figures,
    prior: NoiseContrastivePrior | None,
    drawn: Draws | None,
    proposals: int,
    name: str,
    findings: Sequence[GroupFinding] = (),
) -> list[str]:
    """What a reader should know before trusting the figures."""
    if prior is None or drawn is None:
        return []
    if findings:
        return [*merged_warnings(prior, findings), *_of_another_prior(measured, prior, name)]
    groups = prior.record.get("groups", [])
    found = [warning for group in groups for warning in group["warnings"]]
    if drawn.ess.mean(1).min() < FEW_PROPOSALS:
        found.append(
            f"SIR’s pools of {proposals:,} hold fewer than {FEW_PROPOSALS} effective proposals: "
            "samples repeat the few best. Raise proposals or use a base nearer to the posterior."
        )
    return found + _of_another_prior(measured, prior, name)


def _of_another_prior(measured: Figures, prior: NoiseContrastivePrior, name: str) -> list[str]:
    groups = prior.record.get("groups", [])
    for k, group in enumerate(groups):
        figure = measured.get("jsd" if len(groups) == 1 else f"jsd_{k}")
        if group is None or figure is None or figure.value == group["jsd"]:
            continue
        of = "" if len(groups) == 1 else f" of group {k}"
        return [
            f"The figures were measured for another prior than the one in this run: its JSD{of} is "
            f"{group['jsd']:.3f}, not {figure.value:.3f}. Measure anew with "
            f"'ncprior diagnose {name}'."
        ]
    return []


def cards(known: Figures, findings: Sequence[GroupFinding] = ()) -> list[Card]:
    """The big numbers, of those that were measured."""
    found = []
    if "gap_closed" in known:
        found.append(_gap_card(known))
    largest = _jsd(known)
    if largest is not None:
        k, jsd = largest
        label = "JSD" if k is None else f"Largest JSD, group {k}"
        text = f"size of the hole in nats: 0 without one, {LOG_2:.3f} at most"
        found.append(_card(label, jsd, text, jsd.value / LOG_2))
    if "ess_share" in known:
        ess = known["ess_share"]
        percent = _percent(ess)
        text = "of SIR’s proposals count in a draw; few mean that base and posterior are far apart"
        text += "; mean over the groups" if "jsd" not in known else ""
        found.append(_card("ESS share", percent, text, ess.value, unit=" %"))
    if any("gap_gain" in f.figures or "mmd_gain" in f.figures for f in findings):
        found.append(_mended_card(findings))
    if "log_z" in known:
        text = f"nats, from {known['log_z'].samples:,} base draws; near 0 if the ratios are right"
        found.append(_card("log Z", known["log_z"], text))
    return found


def _mended_card(findings: Sequence[GroupFinding]) -> Card:
    holes = [f for f in findings if f.word in WITH_HOLE]
    if not holes:
        return Card("Groups mended", "–", "", "no group of latents with a hole that could be seen")
    mended = sum(f.word == "mended" for f in holes)
    text = "of latents with a hole: draws of the NCP are much nearer to the posterior’s"
    return Card("Groups mended", f"{mended} of {len(holes)}", "", text, mended / len(holes))


def _gap_card(known: Figures) -> Card:
    own, closed = known.get(f"fd_{VAE_PRIOR}"), known["gap_closed"]
    first, best = own or known.get("fd_base"), known.get("fd_reconstruction")
    whose = "samples of the VAE’s own prior" if own else "base samples"
    none = first and best and first.value - best.value <= 2 * (first.se or 0)
    if none or not math.isfinite(closed.value):
        text = f"{whose} are as near to the data as reconstructions: no gap to close"
        return Card("Gap closed", "–", "", text)
    text = f"of the way in Frechet distance from {whose} to reconstructions"
    if "gap_closed_base" in known:
        text += f"; the base alone {_percent(known['gap_closed_base']).text()} %"
    return _card("Gap closed", _percent(closed), text, closed.value, unit=" %")


def _card(
    label: str, figure: Figure, text: str, share: float | None = None, unit: str = ""
) -> Card:
    within = None if share is None else min(1.0, max(0.0, share))
    return Card(
        label, figure.text() + unit, figure.error() + unit * (not figure.interval), text, within
    )


def _percent(figure: Figure) -> Figure:
    """The same in percent, with at most two decimals of an error."""
    interval = figure.interval and (100 * figure.interval[0], 100 * figure.interval[1])
    se = None if figure.se is None else 100 * figure.se
    return figure._replace(value=100 * figure.value, se=se, interval=interval)


def missing(known: Figures) -> list[str]:
    """Big numbers that were not measured."""
    labels = {"gap_closed": "gap closed", "jsd": "JSD", "ess_share": "ESS share", "log_z": "log Z"}
    if any(OF_A_GROUP.fullmatch(name) for name in known):  # log Z of several groups is seldom known
        labels = {"gap_closed": "gap closed", "ess_share": "ESS share"}
    return [label for name, label in labels.items() if name not in known]


def _jsd(figures: Figures) -> tuple[int | None, Figure] | None:
    """The JSD, of several groups the largest and its group; None if there is none."""
    try:
        return largest_jsd(figures)
    except KeyError:
        return None


def pictures(proposals: int) -> dict[str, tuple[str, str]]:
    """Title of each grid, and what its images are."""
    return {
        "data": ("Data", "test images, which nothing was trained on"),
        "reconstruction": (
            "Reconstructions",
            "decoded draws of the aggregate posterior: the best that any prior can do",
        ),
        "base": ("Base samples", "decoded draws of the base prior, unmended"),
        VAE_PRIOR: ("VAE prior samples", "decoded draws of the VAE’s own prior, unmended"),
        "ncp": (
            "NCP samples",
            f"decoded draws of the noise contrastive prior, each picked from {proposals:,} "
            "proposals",
        ),
    }


def nearest(name: str, neighbours: int, images: int) -> str:
    """What the picture of nearest training images shows."""
    of = "of the noise contrastive prior" if name == "ncp" else "of the base prior"
    return (
        f"Each row: a sample {of}, then the {neighbours} nearest of all {images:,} training images "
        "by Euclidean distance. A sample that is its neighbour to the pixel was memorised; the "
        "figures near train and closer to train of 'ncprior evaluate' measure it."
    )


def base_note(vae: Any, prior: NoiseContrastivePrior | None) -> str:
    """A caveat where the prior stands on another base than the VAE's own."""
    if prior is None or not prior.has_other_base(vae):
        return ""
    return (
        f"The noise contrastive prior of this run stands on a {base_name(prior)}, not on the VAE’s "
        "own prior: JSD, log Z and ESS are all of that base. The gap closed is counted from the "
        "VAE’s own."
    )


def base_name(prior: NoiseContrastivePrior) -> str:
    """The kind of a prior's base, such as "standard normal"; empty for the VAE's own."""
    kind = "" if prior.base is None else type(prior.base).__name__
    return " ".join(re.findall(r"[A-Z][a-z]*", kind)).lower().replace("gaussian", "Gaussian")


def commands(name: str) -> list[tuple[str, str]]:
    """What makes a run, and why."""
    return [
        (f"ncprior train recipe.toml --out {name}", "stage 1: train the VAE"),
        (f"ncprior fit {name}", "stage 2: fit the noise contrastive prior"),
        (f"ncprior diagnose {name}", "measure the hole and the gap closed"),
        (f"ncprior report {name}", "write this page"),
    ]


def describe(value: Any) -> str:
    """A setting as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(describe(item) for item in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {describe(item)}" for name, item in value.items())
    return str(value)
