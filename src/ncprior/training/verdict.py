"""What held-out draws say of a fitted log-ratio: its calibration, its loss, how far to trust it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ncprior.numerics import bootstrap_interval, effective_sample_size, stream
from ncprior.ratios import calibrate, jsd, nce_loss
from ncprior.ratios.nce import LOG_2

COLLAPSED_KL = 0.01  # nats; below it a group's posteriors are its prior
SEPARATED_JSD = 0.97 * LOG_2  # above it the two laws hardly overlap
OVERFIT_SHARE = 0.1  # of the held-out loss


def calibrate_and_judge(
    ratio: Any,
    heldout: tuple[Tensor, Tensor],
    seen: tuple[Tensor, Tensor],
    kl: float,
    *,
    heldout_images: int,
    seed: int,
    fit: bool = True,
    most: float = 20.0,
) -> dict[str, Any]:
    """Calibrate `ratio` on held-out draws; return its figures and what they mean, in words.

    Without `fit` it is judged as it is.

    Args:
        ratio: The network of one group; its temperature and shift are set.
        heldout: Its uncalibrated logits at draws of q and of p, (n,), for held-out images; the
            draws of one image are `heldout_images` apart.
        seen: The same for images that it was fitted on.
        kl: Mean KL(q(z|x) || p(z)) of the group in nats.
        heldout_images: Number of images behind `heldout`.
        seed: Seed of the bootstrap.
        fit: Whether to calibrate.
        most: The largest temperature (`ratios.calibrate`).
    """
    temperature, shift = calibrate(*heldout, most) if fit else (1.0, 0.0)
    if fit:
        ratio.temperature.fill_(temperature)
        ratio.shift.fill_(shift)
    at_q, at_p = (temperature * logits + shift for logits in heldout)
    loss = float(nce_loss(at_q, at_p))
    seen_q, seen_p = (temperature * logits + shift for logits in seen)
    train_loss = float(nce_loss(seen_q, seen_p))
    per_image = F.softplus(-at_q).view(-1, heldout_images).mean(0)
    generator = stream(seed, "bootstrap")
    low, high = bootstrap_interval(per_image, F.softplus(at_p), generator=generator)
    figures = {
        "loss": loss,
        "loss_interval": [low, high],
        "train_loss": train_loss,
        "jsd": float(jsd(loss)),
        "jsd_interval": [float(jsd(high)), float(jsd(low))],
        "kl": kl,
        "ess_share": float(effective_sample_size(at_p.double())) / len(at_p),
        "temperature": temperature,
        "shift": shift,
    }
    return figures | {"warnings": warnings(figures), "histogram": histogram(at_q, at_p)}


def warnings(figures: dict[str, Any]) -> list[str]:
    """What a user should know before trusting these ratios; empty if all is well."""
    found = []
    if figures["kl"] < COLLAPSED_KL:
        found.append(
            "The latents have collapsed: posteriors equal the prior "
            f"(KL {figures['kl']:.2g} nats). There is no hole to mend. "
            "Train the VAE with a KL warm-up or a narrower likelihood."
        )
    if figures["jsd"] > SEPARATED_JSD:
        found.append(
            f"The classifier separates almost perfectly (JSD {figures['jsd']:.3f} of at most "
            f"{LOG_2:.3f} nats): base prior and posterior hardly overlap and the ratios are not "
            "to be trusted. Use a base nearer to the posterior (base = mixture), a larger KL "
            "weight or a wider likelihood."
        )
    gap = figures["loss"] - figures["train_loss"]
    if gap > OVERFIT_SHARE * figures["loss"] and figures["jsd"] <= SEPARATED_JSD:
        found.append(
            f"The classifier over-fits: loss {figures['train_loss']:.3f} on images it was fitted "
            f"on, {figures['loss']:.3f} on held-out ones. It was stopped where the held-out loss "
            "was lowest and then calibrated; more images, dropout or members would help."
        )
    return found


def histogram(at_q: Tensor, at_p: Tensor, bins: int = 60) -> dict[str, list[float]]:
    """Densities of log r under q and under p, over common edges."""
    both = torch.cat([at_q, at_p]).double().cpu()
    low, high = both.quantile(torch.tensor([0.001, 0.999], dtype=torch.float64)).tolist()
    edges = torch.linspace(low, max(high, low + 1e-3), bins + 1, dtype=torch.float64)
    counts = [
        torch.histogram(x.double().cpu(), edges, density=True).hist.tolist() for x in (at_q, at_p)
    ]
    return {"edges": edges.tolist(), "q": counts[0], "p": counts[1]}
