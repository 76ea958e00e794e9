"""Figures of single latent groups: how far apart posterior, base prior and NCP are."""

import re
from typing import Any

import torch
from torch import Tensor

from ncprior.data import ImageDataset, Splits
from ncprior.figures import Figure, Figures
from ncprior.group_samples import GroupSamples, group_samples
from ncprior.metrics import mean_of_terms, median_bandwidth, mmd_terms
from ncprior.numerics import mean_and_se, stream
from ncprior.priors import NoiseContrastivePrior

LEAST_IMAGES = 10  # for a comparison of draws
PILOT_IMAGES = 4000  # for principal components and witnesses

MMDS = ("mmd_base", "mmd_ncp", "mmd_gain")
GAPS = ("gap_base", "gap_ncp", "gap_gain")
LATENTS = tuple(
    f"{kind}_{name}{end}"
    for kind, ends in (("mmd", ["_p"]), ("c2st", ["", "_p"]), ("swd", [""]))
    for name in ("base", "ncp", "floor")
    for end in ends
)  # of `latent_figures`
NAMES = ("nce_loss", "jsd", "kl", "ess_share", "ess", *MMDS, *GAPS, *LATENTS)
"""Figures that each group has; in metrics.json the group's number follows."""
OF_A_GROUP = re.compile(rf"({'|'.join(NAMES)})_(\d+)")


def mmd_figures(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    splits: Splits,
    *,
    images: int = 2000,
    proposals: int = 100,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = False,
) -> Figures:
    """For each group how far base and NCP are from the posterior, by two measures, and SIR's pools.

    The draws are those of `group_samples`; test images, which neither VAE nor classifiers saw, give
    the posterior.

    - The gap of a witness (`group_witness`): a function f(z, c) that was found between posterior
      and base on training images; how far its means are apart on test images, in standard
      deviations of f under the base prior. Positive for the base; below 0 for an NCP that goes
      too far. Under equal laws gap / s.e. is a standard normal number. This is the sharper one.
    - MMD^2: the bandwidth is the median distance within q and p pooled, the same for both. Draws
      of all contexts are pooled, so that a hole which averages out over contexts does not show.

    Args:
        images: Test images to walk along, each once.
        proposals: SIR's pool.

    Returns:
        Figures named `gap_base_K`, `gap_ncp_K`, `gap_gain_K` (by how much the NCP's gap is smaller,
        whatever its sign), the same with `mmd`, `ess_K` and `ess_share_K`; none with fewer than 10
        test images, and no gaps with fewer than 40 training images.
    """
    rows = _some(splits.test, images, seed, "group test rows")
    if len(rows) < LEAST_IMAGES:
        return {}
    pilot = _some(splits.train, PILOT_IMAGES, seed, "group pilot rows")
    found: Figures = {}
    drawn = group_samples(
        vae, prior, data, rows, pilot,
        proposals=proposals, seed=seed, batch_size=batch_size, progress=progress,
    )  # fmt: skip
    for k, samples in drawn:
        own = _compare(samples, seed) | _gaps(samples, seed)
        found |= {f"{name}_{k}": figure for name, figure in own.items()}
        if samples.ess is not None:
            found |= ess_figures(k, samples.ess, proposals, seed, "given posterior draws, ")
    return found


def ess_figures(k: int, ess: Tensor, proposals: int, seed: int, where: str = "") -> Figures:
    """Effective proposals of group k's pools, (n,), and their share of all."""
    note = f"{where}SIR's pools of {proposals}"
    size, share = mean_and_se(ess), mean_and_se(ess / proposals)
    return {
        f"ess_{k}": Figure(size.value, "proposals", len(ess), seed, size.se, note=note),
        f"ess_share_{k}": Figure(share.value, "of proposals", len(ess), seed, share.se, note=note),
    }


def overall(figures: Figures) -> Figures:
    """The figures that are not of single groups."""
    return {name: figure for name, figure in figures.items() if not OF_A_GROUP.fullmatch(name)}


def largest_jsd(figures: Figures) -> tuple[int | None, Figure]:
    """The largest JSD and its group; None where there is only one.

    Raises:
        KeyError: no group was fitted.
    """
    if "jsd" in figures:
        return None, figures["jsd"]
    matches = [(OF_A_GROUP.fullmatch(name), figure) for name, figure in figures.items()]
    found = [(int(m[2]), figure) for m, figure in matches if m and m[1] == "jsd"]
    if not found:
        raise KeyError("jsd")
    return max(found, key=lambda pair: pair[1].value)


def _compare(samples: GroupSamples, seed: int) -> Figures:
    bandwidth = median_bandwidth(samples.posterior, samples.base)
    terms = {"mmd_base": mmd_terms(samples.posterior, samples.base, bandwidth)}
    if samples.ncp is not None:
        terms["mmd_ncp"] = mmd_terms(samples.posterior, samples.ncp, bandwidth)
        terms["mmd_gain"] = terms["mmd_base"] - terms["mmd_ncp"]
    num, size = samples.posterior.shape
    note = f"squared, {size} numbers, bandwidth {bandwidth:.3g}"
    found = {name: mean_of_terms(of_rows) for name, of_rows in terms.items()}
    return {name: Figure(x.value, "MMD^2", num, seed, x.se, note=note) for name, x in found.items()}


def _gaps(samples: GroupSamples, seed: int) -> Figures:
    """Means over the images, each of which is one independent observation."""
    if samples.gap_base is None:
        return {}
    terms = {"gap_base": samples.gap_base}
    if samples.gap_ncp is not None:
        sign = 1 if samples.gap_ncp.mean() >= 0 else -1
        terms["gap_ncp"] = samples.gap_ncp
        terms["gap_gain"] = samples.gap_base - sign * samples.gap_ncp
    found, note = {}, "of a witness found on training images"
    for name, of_images in terms.items():
        x = mean_and_se(of_images)
        found[name] = Figure(x.value, "s.d.", len(of_images), seed, x.se, note=note)
    return found


def _some(rows: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """At most `count` of `rows`, at random."""
    return rows[torch.randperm(len(rows), generator=stream(seed, purpose))[:count]]
