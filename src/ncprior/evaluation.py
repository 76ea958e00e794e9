"""Scores of the base prior and of a noise contrastive prior on the same images and draws."""

import math
from typing import Any

import torch
from torch import Tensor

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.figures import Figures
from ncprior.generation import Draws, draw
from ncprior.metrics import Features
from ncprior.nll_figures import nll_figures
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.quality_figures import frechet_figures, gap_closed

__all__ = [
    "draw_each",
    "evaluate",
    "frechet_figures",
    "gap_closed",
    "nll_figures",
    "training_images",
]

RECONSTRUCTED_IMAGES = 20_000
RECONSTRUCTED_NUMBERS = 1 << 26  # pixels times channels held for them


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
