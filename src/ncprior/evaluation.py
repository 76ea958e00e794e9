"""Scores of the base prior and of a noise contrastive prior on the same images and draws."""

import math
from typing import Any

import torch
from torch import Tensor

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.figures import Figure, Figures
from ncprior.generation import Draws, draw
from ncprior.metrics import (
    Features,
    base_log_ratios,
    default_features,
    frechet_distance,
    importance_weighted_bounds,
    moment_blocks,
)
from ncprior.numerics import jackknife, log_z, mean_and_se, stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.training.progress import progress_bar
from ncprior.walk import device_of, evaluating

RECONSTRUCTED_IMAGES = 20_000
HIERARCHICAL_ROWS = 500  # at a time through a decoder of many layers
RECONSTRUCTED_NUMBERS = 1 << 26  # pixels times channels held for them


def nll_figures(
    vae: Any,
    data: ImageDataset,
    splits: Splits,
    prior: NoiseContrastivePrior | None = None,
    *,
    images: int = 1000,
    importance_samples: int = 200,
    log_z_draws: int = 2_000_000,
    seed: int = 0,
    progress: bool = False,
) -> Figures:
    """NLL of the first test images under the base prior and, from the same draws, under the NCP.

    Args:
        vae: The VAE.
        data: Its images; binarised dynamically, each test image is drawn once, by `seed`.
        splits: Which of them are for test.
        prior: A noise contrastive prior.
        images: Number of test images.
        importance_samples: Posterior draws per image; the NLL, an upper bound, falls with them.
        log_z_draws: Base draws for log Z, whose error enters that of the NCP's NLL.
        seed: Seed of the draws.
        progress: Show progress bars.

    Raises:
        ValueError: a count below 2.
    """
    if images < 2 or importance_samples < 1 or log_z_draws < 2:
        raise ValueError(
            "images and log_z_draws must be at least 2 and importance_samples at least 1, "
            f"got {images=}, {log_z_draws=}, {importance_samples=}"
        )
    if prior is not None:
        vae = prior.under(vae)
    device = device_of(vae)
    rows = splits.test[:images]
    pixels = stream(seed, "nll images") if data.redrawn else None
    generator = stream(seed, "nll", device=device)
    base, ncp = [], []
    with evaluating(vae), progress_bar("likelihood", len(rows), shown=progress) as bar:
        for part in rows.split(50):
            x = data.batch(part, generator=pixels).to(device)
            found = importance_weighted_bounds(
                vae,
                x,
                importance_samples,
                prior=prior,
                generator=generator,
                rows_at_once=10_000 if vae.num_groups == 1 else HIERARCHICAL_ROWS,
            )
            base.append(found.base)
            if found.unnormalized_ncp is not None:
                ncp.append(found.unnormalized_ncp)
            bar(min(len(base) * 50, len(rows)))
    nll = -torch.cat(base)
    note = f"{importance_samples} importance samples"
    score = mean_and_se(nll)
    figures = {"nll_base": Figure(score.value, "nats", len(rows), seed, score.se, note=note)}
    if prior is None:
        return figures
    with evaluating(vae):
        of_base = stream(seed, "nll log z", device=device)
        rows_at_once = 8192 if vae.num_groups == 1 else HIERARCHICAL_ROWS
        z = log_z(
            base_log_ratios(vae, prior, log_z_draws, generator=of_base, rows_at_once=rows_at_once)
        )
    figures["nll_log_z"] = Figure(z.value, "nats", z.num, seed, z.se, note=f"ESS {z.ess:.0f}")
    nll_ncp = -torch.cat(ncp) + z.value
    for name, values in (("nll_ncp", nll_ncp), ("nll_gain", nll - nll_ncp)):
        score = mean_and_se(values)
        se = (score.se**2 + z.se**2) ** 0.5
        figures[name] = Figure(score.value, "nats", len(rows), seed, se, note=note)
    return figures


def evaluate(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    metrics: list[str] | None = None,
    samples: int = 10_000,
    proposals: int = 1000,
    images: int = 1000,
    importance_samples: int = 200,
    log_z_draws: int = 2_000_000,
    features: Features | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Figures:
    """The metrics asked for, "fd" and "nll"; see `frechet_figures` and `nll_figures`.

    Raises:
        ValueError: an unknown metric, or "fd" without a prior.
    """
    wanted = metrics or ["fd", "nll"]
    unknown = set(wanted) - {"fd", "nll"}
    if unknown:
        raise ValueError(f"metrics must be fd or nll, got {', '.join(sorted(unknown))}")
    if "fd" in wanted and prior is None:
        raise ValueError('the metric "fd" compares priors and needs one; fit it with fit_prior')
    data, splits = as_data(data, splits, seed)
    figures: Figures = {}
    if "nll" in wanted:
        figures |= nll_figures(
            vae,
            data,
            splits,
            prior,
            images=images,
            importance_samples=importance_samples,
            log_z_draws=log_z_draws,
            seed=seed,
            progress=progress,
        )
    if "fd" in wanted:
        options = {"proposals": proposals, "progress": progress}
        draws = draw_each(vae, prior, data, splits, samples, seed=seed, **options)
        figures |= frechet_figures(draws, data, splits, features, seed)
    return figures


def training_images(data: ImageDataset, splits: Splits, seed: int) -> Tensor:
    """Training images as the encoder reads them, some of them where there are very many."""
    rows, numbers = splits.train, math.prod(data.image_shape)
    most = max(1, min(RECONSTRUCTED_IMAGES, RECONSTRUCTED_NUMBERS // numbers))
    if len(rows) > most:
        order = torch.randperm(len(rows), generator=stream(seed, "reconstructed rows"))
        rows = rows[order[:most]]
    draws = stream(seed, "reconstructed images") if data.redrawn else None
    return data.batch(rows, generator=draws)


def draw_each(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset,
    splits: Splits,
    samples: int,
    *,
    seed: int = 0,
    **options: Any,
) -> dict[str, Draws]:
    """`samples` images from each of base, ncp and reconstruction; `options` are those of `draw`."""
    if samples < 40:
        raise ValueError(f"samples must be at least 40 for a Frechet distance, got {samples}")
    under = vae if prior is None else prior.under(vae)
    return {
        "base": draw(under, None, samples, seed=seed, **options),
        "ncp": draw(vae, prior, samples, seed=seed, **options),
        "reconstruction": draw(
            vae, None, samples, images=training_images(data, splits, seed), seed=seed, **options
        ),
    }


def frechet_figures(
    draws: dict[str, Draws],
    data: ImageDataset,
    splits: Splits,
    features: Features | None = None,
    seed: int = 0,
) -> Figures:
    """Distances of base, ncp and reconstruction to the test images, and the gap closed."""
    space = features or default_features(data.raw(splits.train[:RECONSTRUCTED_IMAGES]))
    reference = data.raw(splits.test)
    against = moment_blocks(space(reference))
    blocks = {name: moment_blocks(space(found.images)) for name, found in draws.items()}
    unit, samples = f"squared, {space.name}", len(draws["base"].images)
    figures: Figures = {}
    for name in ("base", "ncp", "reconstruction"):
        found = jackknife(frechet_distance, blocks[name], against)
        note = f"{samples} images against {len(reference)} test images"
        figures[f"fd_{name}"] = Figure(found.value, unit, samples, seed, found.se, note=note)
    closed = jackknife(gap_closed, *(blocks[n] for n in ("base", "ncp", "reconstruction")), against)
    note = "(FD base - FD ncp) / (FD base - FD reconstruction)"
    figures["gap_closed"] = Figure(closed.value, "share", samples, seed, closed.se, note=note)
    return figures


def gap_closed(base: Any, ncp: Any, reconstruction: Any, reference: Any) -> float:
    """(FD_base - FD_ncp) / (FD_base - FD_reconstruction) from blocks of moments."""
    at = [frechet_distance(blocks, reference) for blocks in (base, ncp, reconstruction)]
    return (at[0] - at[1]) / (at[0] - at[2])
