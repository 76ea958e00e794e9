"""What a diagnosis means, in plain sentences: each of them rests on a measured figure."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ncprior.figures import VAE_PRIOR, Figure, Figures
from ncprior.group_figures import largest_jsd
from ncprior.group_findings import GroupFinding, name_groups, words_in_short
from ncprior.normal import StandardNormal
from ncprior.priors import GaussianMixture, NoiseContrastivePrior
from ncprior.priors.mixture import SIZES
from ncprior.ratios.nce import LOG_2
from ncprior.samplers.sir import LARGEST, enough_proposals
from ncprior.tail import DOUBTFUL, UNRELIABLE
from ncprior.terminal import wrapped
from ncprior.training.presets import PRESETS
from ncprior.training.verdict import OVERFIT_SHARE, SEPARATED_JSD

HARDLY_ANY, IDLE = 0.01, 0.003  # nats of JSD
FAR_LOG_Z = 1.0  # nats, worth a warning
NEAR_LOG_Z = 0.2
ENOUGH_PROPOSALS = 10  # effective ones: any probability is off by a tenth at most
CONVINCING = 0.01  # p-value
NEARLY_ALL = 0.9  # of the gap
FLATTERED = 0.5  # of the share of proposals that count in a pool is left in very large ones
BEST_BASE = "mixture-auto"
WITH_HOLE = {"mended", "improved", "unchanged", "worse", "hole", "unreliable"}


class Answer(NamedTuple):
    """A question that a user has, and what the figures say."""

    question: str
    text: str


def answers(
    prior: NoiseContrastivePrior,
    figures: Figures,
    findings: Sequence[GroupFinding] = (),
    run: str = "RUN",
) -> list[Answer]:
    """The user's questions, of those that the figures can answer.

    Args:
        prior: The prior, for how its fit went.
        figures: Those of `diagnose`, or what is known of them.
        findings: What was found of each latent group where there are several.
        run: The run's name in the commands that are recommended.
    """
    found = [
        ("How large is the hole?", hole(figures)),
        ("Where is it?", _where(figures, findings)),
        ("What can be won at most?", winnings(figures)),
        ("Can the ratios be trusted?", _trust(prior, figures, findings)),
        ("How many proposals are needed?", _proposals(prior, figures, findings)),
        ("What next?", _next(prior, figures, findings, run)),
    ]
    return [Answer(question, text) for question, text in found if text]


def as_paragraphs(found: Sequence[Answer], width: int | None = None) -> str:
    """Questions, and their answers below them; as wide as the terminal, or `width`."""
    return "\n".join(f"{q}\n{wrapped(text, '  ', '  ', width)}" for q, text in found)


def hole(figures: Figures) -> str:
    """How far posterior and base prior are apart; empty if no group was fitted."""
    try:
        group, jsd = largest_jsd(figures)
    except KeyError:
        return ""
    where = "" if group is None else f" in group {group}, the largest"
    words = "hardly any" if jsd.value < HARDLY_ANY else "a small" if jsd.value < 0.1 else "a large"
    which = "The prior"
    if _start(figures) == VAE_PRIOR:
        which = "The ratios stand on a base that was fitted first, not on the VAE's own prior; it"
    said = f"{which} has {words} hole (JSD {jsd.value:.3f} of at most {LOG_2:.3f} nats{where})."
    if "jsd_test" in figures:
        test = figures["jsd_test"]
        said += (
            f" On test images it is {test.text()} {test.error()}; both are lower bounds on average."
        )
    if "c2st_base" in figures:
        base, own = _share(figures["c2st_base"]), figures.get(f"c2st_{VAE_PRIOR}")
        first = "base samples" if own is None else "samples of the VAE's own prior"
        said += (
            " A classifier of another kind, fitted anew, tells unseen images' latents from "
            f"{first} with an accuracy of {base if own is None else _share(own)}, "
            f"{'' if own is None else f'from those of the base with {base}, '}where chance is 50 %."
        )
    return said


def winnings(figures: Figures) -> str:
    """How much nearer to the data samples could be, and are; empty if that was not measured."""
    if not {"fd_base", "fd_reconstruction", "gap_closed"} <= {*figures}:
        return ""
    start = _start(figures)
    first, best = figures[f"fd_{start}"], figures["fd_reconstruction"]
    error = math.hypot(first.se or 0, best.se or 0)
    own = start == VAE_PRIOR
    if first.value - best.value <= 2 * error:
        whose = "samples of the VAE's own prior" if own else "base samples"
        return (
            f"It hardly shows in {first.unit.removeprefix('squared, ')}: {whose} are as near "
            "to the data as reconstructions, so there is next to nothing to win there."
        )
    of_own = ", that of the VAE's own prior," if own else ""
    said = (
        f"At best a prior could lower the Frechet distance from {first.value:.3f}{of_own} to "
        f"{best.value:.3f}, by {first.value - best.value:.3f} ± {error:.2g}; the noise contrastive "
        f"prior closes {_percent(figures['gap_closed'])} of that gap"
    )
    return said + (f", its base alone {_percent(figures['gap_closed_base'])}." if own else ".")


def _start(figures: Figures) -> str:
    """What the gap is counted from: the VAE's own prior, or the base that is it."""
    return VAE_PRIOR if f"fd_{VAE_PRIOR}" in figures else "base"


def _percent(closed: Figure) -> str:
    return f"{100 * closed.value:.0f} % (± {100 * (closed.se or 0):.0f})"


def _where(figures: Figures, findings: Sequence[GroupFinding]) -> str:
    if not findings:
        return "The VAE has one group of latents: it is in the prior as a whole."
    holes = [f for f in findings if f.word in WITH_HOLE and "jsd" in f.figures]
    if not holes:
        return f"In no group that could be seen. {words_in_short(findings)}"
    first = sorted(holes, key=lambda f: f.figures["jsd"].value, reverse=True)[:3]
    largest = ", ".join(f"{f.group} (JSD {f.figures['jsd'].value:.3f})" for f in first)
    named = name_groups(f.group for f in holes)
    of_all = f"{len(holes)} of {len(findings)} groups have one: {named}"
    return f"{of_all}. The largest: {largest}. {words_in_short(findings)}"


def _trust(prior: NoiseContrastivePrior, figures: Figures, findings: Sequence[GroupFinding]) -> str:
    """Reasons for and against."""
    for_it, against, hopeless = [], [], False
    groups = {k: g for k, g in enumerate(prior.record.get("groups", [])) if g is not None}
    if not groups:
        return ""
    separated = [k for k, g in groups.items() if g["jsd"] > SEPARATED_JSD]
    if separated:
        hopeless = len(separated) == len(groups)
        against.append(f"posterior and prior hardly overlap{_in(separated, findings)}")
    worst = max(groups, key=lambda k: _overfit(groups[k]))
    of = groups[worst]
    losses = f"loss {of['train_loss']:.3f} on images it was fitted on, {of['loss']:.3f} on others"
    if _overfit(of) > OVERFIT_SHARE:
        against.append(f"the classifier over-fits ({losses}{_in([worst], findings, 'most')})")
    elif "combined" not in prior.record:  # that of its parts is theirs
        for_it.append(f"no over-fitting ({losses}{_in([worst], findings, 'at worst')})")
    if "log_z" in figures:
        z = figures["log_z"]
        (for_it if abs(z.value) <= NEAR_LOG_Z else against).append(
            f"the ratios average to {math.exp(z.value):.2g} under the base (log Z {z.text()} "
            f"{z.error()}), right ones to 1"
        )
    k_hat = None if prior.log_z is None else prior.log_z.k_hat
    if k_hat is not None:
        said = f"k-hat of the ratios' tail is {k_hat:.2f}"
        hopeless = hopeless or k_hat > UNRELIABLE
        few = f"{said}, above {DOUBTFUL}: few proposals carry most weight"
        (against if k_hat > DOUBTFUL else for_it).append(few if k_hat > DOUBTFUL else said)
    if "c2st_ncp" in figures:
        accuracy = f"with an accuracy of {_share(figures['c2st_ncp'])}"
        if _tells(figures):
            base = f" (base: {_share(figures['c2st_base'])})" if "c2st_base" in figures else ""
            against.append(
                f"a fresh classifier still tells NCP samples from the posterior, {accuracy}{base}: "
                "that is what ratios or sampler missed"
            )
        else:
            for_it.append(
                "a fresh classifier does not tell NCP samples from the posterior beyond doubt, "
                f"{accuracy} on {figures['c2st_ncp'].samples:,} test images"
            )
    unreliable = [f.group for f in findings if f.word == "unreliable"]
    if unreliable and not separated:
        against.append(f"{name_groups(unreliable)}: unreliable (the table says why)")
    word = "No" if hopeless else "With care" if against else "Yes"
    parts = [f"Against: {'; '.join(against)}."] * bool(against)
    parts += [f"For: {'; '.join(for_it)}."] * bool(for_it)
    return " ".join([f"{word}.", *parts])


def _proposals(
    prior: NoiseContrastivePrior, figures: Figures, findings: Sequence[GroupFinding]
) -> str:
    """How many SIR needs, and how far off its draws are.

    To first order in 1/m the law of SIR's draws has the density 1 + (1 + c - w) / m under the NCP,
    w being r / Z and 1 + c its mean there, which is 1 over the ESS share. Half the mean modulus of
    that, by which any probability can be off at most, is below 1 / (m * share).
    """
    sampled = [f for f in findings if {"ess", "ess_share"} <= {*f.figures}]
    groups = [g for g in prior.record.get("groups", []) if g is not None]
    separated = groups and all(g["jsd"] > SEPARATED_JSD for g in groups)
    if separated and not sampled and not prior.in_stages:
        return (
            "No number will do: hardly any draw of the base lies where posteriors do, and what the "
            "ratios say of the others means nothing."
        )
    if sampled:
        worst = min(sampled, key=lambda f: f.figures["ess"].value)
        ess, share = worst.figures["ess"], worst.figures["ess_share"].value
        of = f" in group {worst.group}, which needs the most"
    elif "ess" in figures and "ess_share" in figures:
        ess, share, of = figures["ess"], figures["ess_share"].value, ""
    else:
        return ""
    pool, lasting = round(ess.value / share), _lasting_share(prior) or share
    rare = lasting < FLATTERED * share
    share = min(share, lasting)
    needed = _rounded_up(ENOUGH_PROPOSALS / share)
    off = min(1.0, 1 / (pool * share))
    held = f"The pools of {pool:,} hold {ess.value:.1f}"
    if rare:
        held += " by their own weights, which know little of ratios that are large and rare"
    return (
        f"About {needed:,} for {ENOUGH_PROPOSALS} effective ones{of}: {100 * share:.2g} % count "
        f"{'among many' if rare else 'on average'}. {held}, so that SIR may shift any probability "
        f"by up to {max(1, round(100 * off))} %; this falls as one over the number of proposals."
        f"{_chosen(prior)}"
    )


def _chosen(prior: NoiseContrastivePrior) -> str:
    """What `--proposals auto` comes to, where the fit knows."""
    share = _lasting_share(prior)
    if share is None:
        return ""
    return f" 'ncprior sample' takes {enough_proposals(share):,} (--proposals auto)."


def _next(
    prior: NoiseContrastivePrior, figures: Figures, findings: Sequence[GroupFinding], run: str
) -> str:
    """What to do, most urgent first."""
    groups = [g for g in prior.record.get("groups", []) if g is not None]
    if not groups:
        return ""
    said = []
    base, best = figures.get(f"fd_{_start(figures)}"), figures.get("fd_reconstruction")
    no_gap = False
    if base is not None and best is not None:
        no_gap = base.value - best.value <= 2 * math.hypot(base.se or 0, best.se or 0)
    if no_gap:
        said.append(
            "Where samples are still poor, reconstructions are too: train a better VAE, no prior "
            "mends it."
        )
    closed = figures.get("gap_closed")
    done = no_gap or (closed is not None and closed.value > NEARLY_ALL)
    combined = "combined" in prior.record  # which is not fitted again but combined anew
    nearer = None if findings or combined else _nearer_base(prior)
    idle = not combined and _tells(figures) and all(g["jsd"] < IDLE for g in groups)
    separated = any(g["jsd"] > SEPARATED_JSD for g in groups)
    if separated and findings:
        said.append(
            "Leave the separated groups to their base prior (--groups), or fit on a nearer base."
        )
    elif separated and nearer:
        said.append(f"Fit on a base nearer to the posterior: {_fit_on(nearer, run)}.")
    elif separated:
        said.append(f"Fit in stages: ncprior fit {run} --stages adaptive --overwrite.")
    elif not done and nearer and closed is not None:
        said.append(f"A base nearer to the posterior may close more: {_fit_on(nearer, run)}.")
    elif idle:
        said.append(
            "The ratio's classifier found next to nothing, though a fresh one does: "
            f"{_stronger_fit(prior, run)} may get it going."
        )
    elif done or combined:
        pass
    elif max(map(_overfit, groups)) > OVERFIT_SHARE:
        said.append(
            "Fit again with more images, more dropout or more members: over-fitting limits the "
            "ratios."
        )
    elif _tells(figures):
        said.append(f"A stronger fit ({_stronger_fit(prior, run)}) may close more.")
    effective = figures.get("ess")
    if effective is not None and effective.value < ENOUGH_PROPOSALS:
        pool = effective.value / figures["ess_share"].value
        share = min(figures["ess_share"].value, _lasting_share(prior) or 1.0)
        more = _rounded_up(max(ENOUGH_PROPOSALS / share, pool))
        ways = []
        if more > LARGEST and not done:
            ways.append(f"draw with --proposals {more}")
        if nearer and f"--base {nearer}" not in " ".join(said):
            ways.append(f"fit on a nearer base, of whose draws more count: {_fit_on(nearer, run)}")
        if ways:
            said.append(f"Few proposals count: {', or '.join(ways)}.")
    won = figures.get("fd_gain_over_base")
    error = 0.0 if won is None else 2 * (won.se or 0)
    if won is not None and won.value < -error:
        said.append("Do not use this prior: its samples are further from the data than the base's.")
    elif won is not None and won.value < error and not no_gap:
        said.append(
            "Its samples are no nearer to the data than its base's, beyond two errors, and those "
            f"are cheaper: ncprior sample {run} --prior base --out samples.npz. Whether it wins "
            f"likelihood says ncprior evaluate {run}."
        )
    elif not no_gap:
        if done and not idle:
            said.append("There is little left to win with a prior; what remains is the decoder's.")
        said.append(f"Sample: ncprior sample {run} --out samples.npz.")
    return " ".join(said)


def _nearer_base(prior: NoiseContrastivePrior) -> str | None:
    """A mixture to fit on instead of N(0, I) or of a small one; None where that is no advice."""
    small = isinstance(prior.base, GaussianMixture) and len(prior.base.means) <= SIZES[0]
    chosen = prior.record.get("base") == BEST_BASE
    return BEST_BASE if _is_plain(prior) or (small and not chosen) else None


def _is_plain(prior: NoiseContrastivePrior) -> bool:
    """Whether the ratio multiplies the VAE's own prior, or N(0, I)."""
    return prior.base is None or isinstance(prior.base, StandardNormal)


def _stronger_fit(prior: NoiseContrastivePrior, run: str) -> str:
    """The preset for many images if the fit had a weaker one, else twice as many steps."""
    preset, settings = "large" if _is_plain(prior) else "near", prior.record.get("settings", {})
    weaker = settings.get("batch_size", 0) < PRESETS[preset]["batch_size"]
    how = f"--preset {preset}" if weaker else f"--steps {2 * settings['steps']}"
    return f"ncprior fit {run} {how} --overwrite"


def _fit_on(base: str, run: str) -> str:
    return f"ncprior fit {run} --base {base} --overwrite"


def _overfit(group: dict[str, Any]) -> float:
    """By what share of the held-out loss the loss on images seen is lower."""
    return float(group["loss"] - group["train_loss"]) / max(float(group["loss"]), 1e-12)


def _tells(figures: Figures) -> bool:
    """Whether a fresh classifier tells NCP from posterior beyond doubt."""
    p = figures.get("c2st_ncp_p")
    return p is not None and p.value < CONVINCING and figures["c2st_ncp"].value > 0.5


def _lasting_share(prior: NoiseContrastivePrior) -> float | None:
    """The ESS share that large pools tend to, from the many base draws for log Z of one group."""
    if prior.log_z is None or prior.num_groups > 1 or prior.in_stages:
        return None
    return prior.log_z.ess / prior.log_z.num


def _in(groups: Sequence[int], findings: Sequence[GroupFinding], how: str = "") -> str:
    """Where among several groups; nothing where there is one."""
    if not findings:
        return ""
    return f"{', ' + how if how else ''} in {name_groups(groups)}"


def _share(figure: Figure) -> str:
    """A share with its error, in percent."""
    return f"{100 * figure.value:.0f} ± {100 * (figure.se or 0):.0f} %"


def _rounded_up(value: float) -> int:
    """To two digits."""
    unit = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return math.ceil(value / unit - 1e-9) * unit
