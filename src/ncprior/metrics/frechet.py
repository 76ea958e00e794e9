"""Frechet distance between two sets of features, with its jackknife error and without its bias."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.metrics.features import check_features
from ncprior.numerics import Estimate

BLOCKS = 20
"""Blocks that the jackknife leaves out in turn."""
COLUMNS = 512
"""Columns of a streamed product at a time, of which only what is right of the diagonal is made."""


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
    """Features (n, f) dealt into blocks, for `frechet_estimates` and `numerics.jackknife`.

    Dealt, not cut: the rows of some data sets are ordered (the first half of MNIST's test images is
    the cleaner one), and blocks must be alike.

    Raises:
        ValueError: fewer than 2 rows, NaN or infinity, or rows that are all the same.
    """
    check_features(features)
    count = min(blocks, len(features) // 2 + 1)
    return [moments(features[first::count]) for first in range(count)]


def streamed_moments(batches: Iterable[Tensor]) -> Moments:
    """Moments of features that come in batches (n_i, f); one f by f matrix is held.

    Raises:
        ValueError: no batch, NaN or infinity.
    """
    num, total, outer = 0, None, None
    for batch in batches:
        if batch.ndim != 2 or not batch.isfinite().all():
            raise ValueError(
                f"features must be (n, f) and finite, got {tuple(batch.shape)} with "
                f"{int((~batch.isfinite()).sum())} numbers that are not"
            )
        x = batch.double()
        if total is None or outer is None:
            total, outer = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        num += len(x)
        total += x.sum(0)
        for first in range(0, x.shape[1], COLUMNS):
            some = slice(first, first + COLUMNS)
            outer[some, first:].addmm_(x[:, some].T, x[:, first:])
    if total is None or outer is None:
        raise ValueError("batches must hold at least one batch of features, got none")
    return Moments(num, total, outer.triu_().add_(outer.triu(1).T))


def frechet_distance(a: Iterable[Moments], b: Iterable[Moments]) -> float:
    """|mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), squared units of the features.

    The trace of the root comes from symmetric eigenvalues in float64. The plug-in value is biased
    upwards by O(1/n): compare values at equal n.

    Reference: Heusel et al. (2017), Dowson and Landau (1982).
    """
    first = _gaussian(merge(a))
    return _distance(first, _root(first[1]), _gaussian(merge(b)))


class Frechet(NamedTuple):
    """A Frechet distance from finite sets, and what it tends to as both grow."""

    plain: Estimate
    at_infinity: Estimate
    without_a: Tensor  # (blocks of a,), the plain value without each block of a
    without_b: Tensor  # (blocks of b,)


def frechet_estimates(a: Sequence[Moments], b: Sequence[Moments]) -> Frechet:
    """The distance of two sets dealt into blocks, its error, and its limit for infinite sets.

    The plain value is too large by c_a / n_a + c_b / n_b and smaller terms. Each block left out in
    turn shows by how much the value grows as 1/n does; a line through these extrapolates to 1/n = 0
    for both sets, and the spread of the same values gives the standard error. The limit may come
    out negative where the laws are the same. It holds only while the smaller terms are small: with
    fewer rows than features both values mean little.

    Args:
        a: Blocks of one set, as `moment_blocks` deals them; at least 2.
        b: Blocks of the other.

    Reference: Chong and Forsyth (CVPR 2020) for the extrapolation. Their subsets are random and of
    many sizes; ours, all but one block, are those of the jackknife (Quenouille 1956), which needs
    no further draws and stays nearer to 1/n = 0, where the line holds.
    """
    if len(a) < 2 or len(b) < 2:
        raise ValueError(f"a and b must have at least 2 blocks each, got {len(a)} and {len(b)}")
    whole = merge(a), merge(b)
    laws = [_gaussian(part) for part in whole]
    roots = [_root(law[1]) for law in laws]
    plain = _distance(laws[0], roots[0], laws[1])
    without = []
    for i, blocks in enumerate((a, b)):
        law, root = laws[1 - i], roots[1 - i]  # of the set that stays whole: its root serves all
        left_out = [_distance(law, root, _gaussian(_without(whole[i], part))) for part in blocks]
        without.append(torch.tensor(left_out, dtype=torch.float64))
    bias = sum((len(part) - 1) * (float(part.mean()) - plain) for part in without)
    se = math.sqrt(sum((len(part) - 1) * float(part.var(correction=0)) for part in without))
    return Frechet(Estimate(plain, se), Estimate(plain - bias, se), *without)


def _without(whole: Moments, block: Moments) -> Moments:
    return Moments(whole.num - block.num, whole.total - block.total, whole.outer - block.outer)


def _gaussian(m: Moments) -> tuple[Tensor, Tensor]:
    mean = m.total / m.num
    return mean, (m.outer - m.num * torch.outer(mean, mean)) / (m.num - 1)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _distance(a: tuple[Tensor, Tensor], root_a: Tensor, b: tuple[Tensor, Tensor]) -> float:
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    cross = torch.linalg.eigvalsh(root_a @ cov_b @ root_a).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)
