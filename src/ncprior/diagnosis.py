"""How large the hole in the prior is, and how much of it a noise contrastive prior closes."""

import math
from typing import Any, NamedTuple

from torch import Tensor

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.evaluation import draw_each, frechet_figures
from ncprior.figures import Figure, Figures, as_text, table
from ncprior.generation import Draws
from ncprior.metrics import Features
from ncprior.numerics import mean_and_se
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios.nce import LOG_2
from ncprior.training import fit_prior

FAR_LOG_Z = 1.0  # nats


class Diagnosis(NamedTuple):
    """Figures and what they mean; prints as a table."""

    figures: Figures
    warnings: list[str]
    draws: dict[str, Draws]  # "base", "ncp", "reconstruction"

    def __str__(self) -> str:
        lines = [as_text(table(self.figures)), verdict(self.figures)]
        return "\n".join(lines + [f"! {warning}" for warning in self.warnings])


def diagnose(
    vae: Any,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    prior: NoiseContrastivePrior | None = None,
    *,
    samples: int = 10_000,
    proposals: int = 1000,
    sampler: str = "sir",
    temperature: float = 1.0,
    features: Features | None = None,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = False,
) -> Diagnosis:
    """Measure a VAE's prior hole and what `prior` does about it.

    The Frechet distances are between decoder means and the test images, in a named feature space;
    reconstructions are decoded draws of the training images' aggregate posterior, the best that any
    prior can reach. The NCE loss, JSD and log Z were measured on held-out data when the prior was
    fitted.

    Args:
        vae: The VAE.
        data: Its images, or a tensor (n, c, h, w) in [0, 1].
        splits: Which of them are for training, validation and test; 80/10/10 at random by default.
        prior: The prior to judge; by default one is fitted on the training images.
        samples: Images drawn from each of base, NCP and aggregate posterior.
        proposals: SIR's pool.
        sampler: "sir" or "langevin".
        temperature: Factor on the standard deviation of the base prior.
        features: Feature space; pixels for small images, else principal components.
        seed: Seed of what is drawn.
        batch_size: Images drawn at a time.
        progress: Show progress bars.
    """
    data, splits = as_data(data, splits, seed)
    options = {
        "sampler": sampler,
        "proposals": proposals,
        "temperature": temperature,
        "batch_size": batch_size,
    }
    prior = prior or fit_prior(vae, data, rows=splits.train, seed=seed, progress=progress)
    drawn = draw_each(vae, prior, data, splits, samples, seed=seed, progress=progress, **options)
    figures = held_out_figures(prior)
    if sampler == "sir":
        ess = mean_and_se(drawn["ncp"].ess.mean(0) / proposals)
        note = f"mean ESS of SIR's pools of {proposals}"
        figures["ess_share"] = Figure(ess.value, "of proposals", samples, seed, ess.se, note=note)
    figures |= frechet_figures(drawn, data, splits, features, seed)
    warnings = [w for group in prior.record["groups"] for w in group["warnings"]]
    if sampler == "sir" and figures["ess_share"].value * proposals < 3:
        warnings.append(
            "SIR's pools hold fewer than 3 effective proposals: samples repeat the few best. "
            "Raise proposals or use a base nearer to the posterior."
        )
    if prior.log_z is not None and abs(prior.log_z.value) > FAR_LOG_Z:
        warnings.append(
            f"log Z is {prior.log_z.value:.2f}, far from 0: the ratios do not average to 1 under "
            "the base. Samples do not depend on it, but it says that the ratios are off somewhere."
        )
    return Diagnosis(figures, warnings, drawn)


def held_out_figures(prior: NoiseContrastivePrior) -> Figures:
    """NCE loss, JSD and log Z, as measured when the prior was fitted."""
    record, figures = prior.record, {}
    several = len(record["groups"]) > 1
    for k, group in enumerate(record["groups"]):
        suffix = f"_{k}" if several else ""
        for name in ("loss", "jsd"):
            label = f"nce_{name}" if name == "loss" else name
            figures[label + suffix] = Figure(
                group[name],
                "nats",
                record["heldout_images"],
                record["seed"],
                interval=tuple(group[f"{name}_interval"]),
                note="held out",
            )
    if prior.log_z is not None:
        note = f"ESS {prior.log_z.ess:.0f}; should be near 0"
        z = prior.log_z
        figures["log_z"] = Figure(z.value, "nats", z.num, record["seed"], z.se, note=note)
    return figures


def verdict(figures: Figures) -> str:
    """The answer to the user's question in one sentence or two."""
    jsd = max(f.value for name, f in figures.items() if name.startswith("jsd"))
    best, base, closed = (figures[n] for n in ("fd_reconstruction", "fd_base", "gap_closed"))
    words = "hardly any" if jsd < 0.01 else "a small" if jsd < 0.1 else "a large"
    said = f"The prior has {words} hole (JSD {jsd:.3f} of at most {LOG_2:.3f} nats)."
    if base.value - best.value <= 2 * math.hypot(base.se or 0, best.se or 0):
        return said + (
            f" It hardly shows in {base.unit.removeprefix('squared, ')}: base samples are as near "
            "to the data as reconstructions, so there is next to nothing to win there."
        )
    return said + (
        f" At best a prior could lower the Frechet distance from {base.value:.3f} to "
        f"{best.value:.3f}; the noise contrastive prior closes "
        f"{100 * closed.value:.0f} % (± {100 * (closed.se or 0):.0f}) of that gap."
    )
