"""How large the hole in the prior is, and how much of it a noise contrastive prior closes."""

import inspect
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ncprior.answers import FAR_LOG_Z, Answer, answers, as_paragraphs, hole, winnings
from ncprior.data import ImageDataset, Splits, as_data
from ncprior.evaluation import draw_each, seen_test_images
from ncprior.figures import Figure, Figures, table
from ncprior.generation import AUTO, Draws, draw, sampler_of
from ncprior.group_figures import ess_figures, mmd_figures, overall
from ncprior.group_findings import (
    FEW_PROPOSALS,
    GroupFinding,
    group_findings,
    group_table,
    inactive_note,
    merged_warnings,
    words_in_short,
)
from ncprior.groups import check_groups
from ncprior.latent_figures import jsd_on_test_images, latent_figures
from ncprior.metrics import Features
from ncprior.numerics import mean_and_se
from ncprior.priors import NoiseContrastivePrior
from ncprior.quality_figures import frechet_figures, yardsticks
from ncprior.terminal import as_text, warned, wrapped
from ncprior.training import fit_prior


class Diagnosis(NamedTuple):
    """Figures and what they mean; prints as answers and a table, of several groups as two."""

    figures: Figures
    warnings: list[str]
    draws: dict[str, Draws]  # of `draw_each`: "base", "ncp", "reconstruction", "vae_prior"
    groups: Sequence[GroupFinding] = ()  # one for each latent group where there are several
    answers: Sequence[Answer] = ()  # to what a user asks, in words

    def __str__(self) -> str:
        lines = [as_paragraphs(self.answers), ""] if self.answers else []
        lines.append(as_text(table(overall(self.figures))))
        if self.groups:
            lines += ["", as_text(group_table(self.groups)), ""]
        if not self.answers:
            lines.append(wrapped(verdict(self.figures)))
        if self.groups and not self.answers:
            lines.append(wrapped(words_in_short(self.groups)))
        return "\n".join([*lines, *map(warned, self.warnings)])


def diagnose(
    vae: Any,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    prior: NoiseContrastivePrior | None = None,
    *,
    samples: int = 10_000,
    proposals: int = 1000,
    sampler: str = AUTO,
    temperature: float = 1.0,
    groups: str | Sequence[int] | None = None,
    group_samples: int = 2000,
    group_proposals: int = 100,
    latent_metrics: Sequence[str] = ("mmd", "c2st", "swd"),
    latent_images: int = 1000,
    batch_norm_passes: int = 0,
    features: Features | None = None,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = False,
    **options: Any,
) -> Diagnosis:
    """Measure a VAE's prior hole and what `prior` does about it.

    The Frechet distances are between decoder means and the test images, in a named feature space;
    reconstructions are decoded draws of the training images' aggregate posterior, the best that any
    prior can reach. The NCE loss, JSD and log Z were measured on held-out data when the prior was
    fitted; the JSD is measured once more on test images.

    Of one latent group the latents of base and NCP are compared with posterior draws of test images
    (`latent_figures`). The answers in words come from `ncprior.answers`.

    With several latent groups each has a line of its own (section 5.4 of the paper): its KL,
    held-out loss, JSD and ESS; the MMD from posterior draws to those of base and NCP, given the
    same groups before it (`mmd_figures`); and a word on whether it is mended (`WORDS` of
    `ncprior.group_findings` says what each means).

    Args:
        vae: The VAE.
        data: Its images, or a tensor (n, c, h, w) in [0, 1].
        splits: Which of them are for training, validation and test; 80/10/10 at random by default.
        prior: The prior to judge; by default one is fitted on the training images.
        samples: Images drawn from each of base, NCP and aggregate posterior.
        proposals: SIR's pool.
        sampler: As in `draw`.
        temperature: Factor on the standard deviation of the base prior.
        groups: Latent groups whose samples are drawn from the NCP, such as "0-4"; all that were
            fitted by default. The comparison of groups is of all that were fitted.
        group_samples: Test images for the comparison of groups, at most; 0 for none.
        group_proposals: SIR's pool there.
        latent_metrics: Which of "mmd", "c2st" and "swd" to take of the latents of a flat VAE.
        latent_images: Test images for them, at most.
        batch_norm_passes: As in `draw`.
        features: Feature space; pixels for small images, else principal components.
        seed: Seed of what is drawn.
        batch_size: Images drawn at a time.
        progress: Show progress bars.
        options: Other arguments of `draw`, such as those of Langevin dynamics.
    """
    if groups is not None:
        groups = check_groups(groups, vae.num_groups)
    if group_samples < 0 or group_proposals < 1:
        raise ValueError(
            "group_samples must be at least 0 and group_proposals at least 1, "
            f"got {group_samples} and {group_proposals}"
        )
    inspect.signature(draw).bind_partial(**options)  # a misspelt one stops here
    data, splits = as_data(data, splits, seed)
    space, _ = yardsticks(["fd"], data, splits, features)
    options |= {
        "groups": groups,
        "proposals": proposals,
        "temperature": temperature,
        "batch_norm_passes": batch_norm_passes,
        "batch_size": batch_size,
    }
    prior = prior or fit_prior(vae, data, rows=splits.train, seed=seed, progress=progress)
    prior.check_fitted_on(vae)
    options["sampler"] = sampler = sampler_of(prior, sampler)
    drawn = draw_each(vae, prior, data, splits, samples, seed=seed, progress=progress, **options)
    figures = held_out_figures(prior)
    several = prior.num_groups > 1
    if several and group_samples:
        figures |= mmd_figures(
            vae, prior, data, splits,
            images=group_samples, proposals=group_proposals, seed=seed, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
    if not several:
        jsd = jsd_on_test_images(vae, prior, data, splits, seed=seed, batch_size=batch_size)
        figures["jsd_test"] = jsd
    if sampler == "sir":
        figures |= _pool_figures(drawn["ncp"], proposals, samples, seed)
    if not several and latent_metrics:
        figures |= latent_figures(
            vae, prior, data, splits, drawn,
            metrics=latent_metrics, images=latent_images, seed=seed, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
    figures |= frechet_figures(drawn, data, splits, space, seed)
    findings = group_findings(prior, figures) if several else []
    if several:
        warnings = merged_warnings(prior, findings) + inactive_note(prior)
    else:
        warnings = [w for group in prior.record["groups"] for w in group["warnings"]]
        if sampler == "sir" and figures["ess_share"].value * proposals < FEW_PROPOSALS:
            warnings.append(
                "SIR's pools hold fewer than 3 effective proposals: samples repeat the few best. "
                "Raise proposals or use a base nearer to the posterior."
            )
    first = [*prior.record.get("vae_warnings", []), *seen_test_images(prior, data, splits)]
    warnings = [*first, *warnings]
    if prior.log_z is not None and abs(prior.log_z.value) > FAR_LOG_Z:
        warnings.append(
            f"log Z is {prior.log_z.value:.2f}, far from 0: the ratios do not average to 1 under "
            "the base. Samples do not depend on it, but it says that the ratios are off somewhere."
        )
    found = answers(prior, figures, findings)
    return Diagnosis(figures, warnings, drawn, findings, found)


def fit_summary(prior: NoiseContrastivePrior) -> str:
    """What the fit found, as text: a table of figures, or of latent groups if there are several.

    ESS shares of groups are of held-out draws of the prior, contexts pooled; ratios of which fewer
    than 3 in 1000 count are called unreliable.
    """
    figures = held_out_figures(prior)
    if prior.num_groups == 1:
        return as_text(table(figures))
    record = prior.record
    for k, group in enumerate(record["groups"]):
        if group is not None:
            share, count = group["ess_share"], record["heldout_images"]
            figures[f"ess_share_{k}"] = Figure(share, "of proposals", count, record["seed"])
    findings = group_findings(prior, figures)
    lines = [as_text(group_table(findings)), wrapped(words_in_short(findings))]
    if prior.log_z is not None:
        lines.append(f"log Z {figures['log_z'].text()} {figures['log_z'].error()} nats.")
    said = merged_warnings(prior, findings) + inactive_note(prior)
    return "\n".join([*lines, *map(warned, said)])


def combined_summary(prior: NoiseContrastivePrior) -> str:
    """What `combine` found, as text: a table of the parts, and what they win together."""
    from rich.table import Table

    record, shown = prior.record, Table()
    shown.add_column("prior")
    shown.add_column("weight", justify="right", no_wrap=True)
    shown.add_column("nats won over the VAE's prior", justify="right", no_wrap=True)
    together = {"name": "together", "weight": math.nan} | record["bound"]
    for part in [*record["combined"], together]:
        weight = "" if math.isnan(part["weight"]) else f"{part['weight']:.2f}"
        shown.add_row(part["name"], weight, f"{part['value']:.3f} ± {part['se']:.3f}")
    gain, count = record["gain"], record["heldout_images"]
    said = (
        f"Together they win {gain['value']:.3f} ± {gain['se']:.3f} nats more than the best alone: "
        f"in the ELBO, of the {count:,} images that chose the weights."
    )
    if gain["value"] < 2 * gain["se"]:
        said += " That is within the error; the best alone costs less."
    return f"{as_text(shown)}\n{wrapped(said)}"


def held_out_figures(prior: NoiseContrastivePrior) -> Figures:
    """NCE loss, JSD and log Z, as measured when the prior was fitted.

    Those of several latent groups have the group's number in their name, and a KL beside them.
    """
    record = prior.record
    figures: Figures = {}
    num, seed, several = record["heldout_images"], record["seed"], len(record["groups"]) > 1
    whose = "images that chose the weights" if "combined" in record else "held out"
    fitted = {k: group for k, group in enumerate(record["groups"]) if group is not None}
    if several:
        total = sum(group["kl"] for group in fitted.values())
        note = f"held out, sum over {len(fitted)} of {len(record['groups'])} groups"
        figures["kl"] = Figure(total, "nats", num, seed, note=note)
    for k, group in fitted.items():
        suffix = f"_{k}" if several else ""
        for name in ("loss", "jsd"):
            label = f"nce_{name}" if name == "loss" else name
            interval = tuple(group[f"{name}_interval"])
            note = whose if name == "loss" else f"{whose}, a lower bound on average"
            figures[label + suffix] = Figure(
                group[name], "nats", num, seed, interval=interval, note=note
            )
        if several:
            figures[f"kl_{k}"] = Figure(group["kl"], "nats", num, seed, note="held out")
    if prior.log_z is not None:
        note = f"ESS {prior.log_z.ess:.0f}; should be near 0"
        z = prior.log_z
        figures["log_z"] = Figure(z.value, "nats", z.num, record["seed"], z.se, note=note)
    return figures


def _pool_figures(drawn: Draws, proposals: int, samples: int, seed: int) -> Figures:
    """The effective share of SIR's pools: its mean and, of several groups, that of each."""
    figures: Figures = {}
    if len(drawn.ess) > 1:
        for k, sizes in enumerate(drawn.ess):
            if not sizes.isnan().any():  # NaN where the group keeps its base prior
                figures |= ess_figures(k, sizes, proposals, seed)
    ess = mean_and_se(drawn.ess.nanmean(0) / proposals)
    note = f"mean ESS of SIR's pools of {proposals}"
    if len(drawn.ess) > 1:
        note += ", mean over the groups"
    if len(drawn.ess) == 1:
        size = mean_and_se(drawn.ess[0])
        figures["ess"] = Figure(size.value, "proposals", samples, seed, size.se, note=note)
    figures["ess_share"] = Figure(ess.value, "of proposals", samples, seed, ess.se, note=note)
    return figures


def verdict(figures: Figures) -> str:
    """How large the hole is and what was won, in a sentence or two."""
    return f"{hole(figures)} {winnings(figures)}"
