"""Frechet distance between two sets of features, with its jackknife error."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

BLOCKS = 20
"""Blocks that the jackknife leaves out in turn."""


class Moments(NamedTuple):
    """Sums from which mean and covariance follow; they add over batches. Float64."""

    num: int
    total: Tensor  # (f,)
    outer: Tensor  # (f, f)


def moments(features: Tensor) -> Moments:
    """Sums of features (n, f)."""
    x = features.double()
    return Moments(len(x), x.sum(0), x.T @ x)


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of the union of disjoint sets."""
    nums, totals, outers = zip(*parts, strict=True)
    return Moments(sum(nums), torch.stack(totals).sum(0), torch.stack(outers).sum(0))


def moment_blocks(features: Tensor, blocks: int = BLOCKS) -> list[Moments]:
    """Features (n, f) dealt into blocks, for `numerics.jackknife`.

    Dealt, not cut: the rows of some data sets are ordered (the first half of MNIST's test images is
    the cleaner one), and blocks must be alike.
    """
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(
            f"features must be (n, f) with n of at least 2, got {tuple(features.shape)}"
        )
    if not features.isfinite().all():
        raise ValueError("features must be finite, found NaN or infinity")
    count = min(blocks, len(features) // 2 + 1)
    return [moments(features[first::count]) for first in range(count)]


def frechet_distance(a: Iterable[Moments], b: Iterable[Moments]) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), squared units of the features.

    The trace of the root comes from symmetric eigenvalues in float64. The plug-in value is biased
    upwards by O(1/n): compare values at equal n.

    Reference: Heusel et al. (2017), Dowson and Landau (1982).
    """
    (mean_a, cov_a), (mean_b, cov_b) = _gaussian(merge(a)), _gaussian(merge(b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _gaussian(m: Moments) -> tuple[Tensor, Tensor]:
    mean = m.total / m.num
    return mean, (m.outer - m.num * torch.outer(mean, mean)) / (m.num - 1)
