"""A function that tells posterior from prior draws of a group, found on some images for others.

The mean discrepancy of a kernel sees little in a hundred dimensions, since noise comes from all of
them. Here some images decide along which function f(z, c) of latents and context posterior and
prior differ most; on other images it is then measured how far the means of f are apart, in standard
deviations of f under the prior. f knows neither those images nor the ratio, so that under equal
laws a gap over its standard error is a standard normal number. f sees the context, so that a hole
which averages out over contexts shows as well.

Reference: Kuebler et al., A Witness Two-Sample Test (AISTATS 2022), whose witness is a kernel
discriminant. Ours is Fisher's discriminant on the features that differ most, each of one coordinate
of z, since holes of latents mostly show there.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

KEPT = (8, 32, 128, 512)
"""Numbers of features to choose from."""
RIDGE = 0.1
NUMBERS_AT_ONCE = 1 << 23
MODULATED = 2
"""So many of the functions are also multiplied by each number of the context."""


class Term(NamedTuple):
    """One function of some coordinates, times a number of the context or 1, summed with weights."""

    function: int  # of `_functions`
    factor: int  # 0 for none, else the number of the context, from 1
    places: Tensor  # (t,), coordinates
    weights: Tensor  # (t,)


class Witness(NamedTuple):
    """f(z, c)."""

    center: Tensor  # (f,)
    axes: Tensor  # (f, a), from centred z to coordinates
    terms: list[Term]

    def __call__(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """f at z (n, m, f), m of them for each context (n, g), as (n, m)."""
        coordinates = (z - self.center) @ self.axes
        total = z.new_zeros(z.shape[:2])
        for function, factor, places, weights in self.terms:
            part = _function(coordinates[..., places], function) @ weights
            if factor:
                assert context is not None
                part = part * context[:, factor - 1, None]
            total += part
        return total


@torch.no_grad()
def fit_witness(posterior: Tensor, prior: Tensor, context: Tensor | None = None) -> Witness:
    """The witness between draws of q(z | c) and of p(z | c) for the same images.

    Coordinates are those of z and the principal axes of q; their features are ranked by how
    surely the two means differ. How many are kept is chosen by halves of the images: found on one
    half, the gap must be large on the other, relative to its error.

    Args:
        posterior: (n, d, f), d draws for each image.
        prior: (n, d, f).
        context: (n, g), a few numbers of unit size; None without.

    Raises:
        ValueError: fewer than 8 images.
    """
    if len(posterior) < 8:
        raise ValueError(f"a witness needs at least 8 images, got {len(posterior)}")
    pooled = torch.cat([posterior, prior], 1).flatten(0, 1)
    center = pooled.mean(0)
    turned = torch.linalg.eigh(torch.cov(posterior.flatten(0, 1).T)).eigenvectors
    axes = torch.cat([torch.eye(len(center), dtype=pooled.dtype), turned], 1)
    axes = axes / ((pooled - center) @ axes).std(0).clamp_min(1e-6)
    found = Witness(center, axes, [])
    n, halves = len(posterior), torch.arange(len(posterior)) % 2
    sums = _differences(found, posterior, prior, context, halves)  # (2, 2, features)
    merits = {count: 0.0 for count in KEPT if count <= sums.shape[-1]}
    for fitted in (0, 1):
        order = _surest(sums[fitted], int((halves == fitted).sum()), max(merits))
        at_q, at_p = _at(found, order, posterior, prior, context)
        own = halves == fitted
        for count in merits:
            weights = _discriminant(at_q[own][..., :count], at_p[own][..., :count])
            gap = ((at_q - at_p)[~own][..., :count] @ weights).mean(1)
            merits[count] += float(gap.mean() / gap.std().clamp_min(1e-12))
    count = max(merits, key=merits.__getitem__)
    order = _surest(sums.sum(0), n, count)
    at_q, at_p = _at(found, order, posterior, prior, context)
    weights = _discriminant(at_q, at_p)
    weights = weights / (at_p @ weights).std().clamp_min(1e-12)
    kinds, places = order // axes.shape[1], order % axes.shape[1]
    terms = [
        Term(*_kinds(context)[int(kind)], places[kinds == kind], weights[kinds == kind])
        for kind in kinds.unique()
    ]
    return Witness(center, axes, terms)


def _kinds(context: Tensor | None) -> list[tuple[int, int]]:
    """Every function alone, and the first ones times each number of the context."""
    factors = 0 if context is None else context.shape[1]
    alone = [(function, 0) for function in range(6)]
    return alone + [(f, j + 1) for j in range(factors) for f in range(MODULATED)]


def _function(x: Tensor, number: int) -> Tensor:
    if number < 2:
        return x if number == 0 else x.square()
    wave, turned = divmod(number - 2, 2)
    return (x * 1.5 * (1 + wave)).sin() if turned else (x * 1.5 * (1 + wave)).cos()


def _features(found: Witness, z: Tensor, context: Tensor | None) -> Tensor:
    """All features of z (n, d, f), (n, d, kinds * a)."""
    coordinates = (z - found.center) @ found.axes
    columns = []
    for function, factor in _kinds(context):
        column = _function(coordinates, function)
        if factor:
            assert context is not None
            column = column * context[:, factor - 1, None, None]
        columns.append(column)
    return torch.cat(columns, -1)


def _differences(
    found: Witness, posterior: Tensor, prior: Tensor, context: Tensor | None, halves: Tensor
) -> Tensor:
    """Sums over each half's images of the features' differences and of their squares."""
    total: Tensor | None = None
    for own in _slices(found, posterior, context):
        c = None if context is None else context[own]
        gaps = _features(found, posterior[own], c) - _features(found, prior[own], c)
        gaps = gaps.mean(1)
        if total is None:
            total = gaps.new_zeros(2, 2, gaps.shape[1])
        for half in (0, 1):
            some = gaps[halves[own] == half]
            total[half] += torch.stack([some.sum(0), some.square().sum(0)])
    assert total is not None
    return total


def _surest(sums: Tensor, n: int, count: int) -> Tensor:
    """The features whose mean difference is largest relative to its error."""
    mean, square = sums / n
    sureness = mean.abs() / (square - mean.square()).clamp_min(1e-12).sqrt()
    return sureness.topk(count).indices


def _at(
    found: Witness, order: Tensor, posterior: Tensor, prior: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Those features, in that order, at all draws: twice (n, d, t)."""
    pieces = []
    for own in _slices(found, posterior, context):
        c = None if context is None else context[own]
        pieces.append([_features(found, z[own], c)[..., order] for z in (posterior, prior)])
    at_q, at_p = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return at_q, at_p


def _slices(found: Witness, z: Tensor, context: Tensor | None) -> Iterator[slice]:
    each = z.shape[1] * found.axes.shape[1] * len(_kinds(context))
    rows = max(1, NUMBERS_AT_ONCE // each)
    return (slice(first, first + rows) for first in range(0, len(z), rows))


def _discriminant(at_q: Tensor, at_p: Tensor) -> Tensor:
    """(S + ridge diag S)^-1 (mean_q - mean_p), S being the covariance within."""
    q, p = at_q.flatten(0, 1).double(), at_p.flatten(0, 1).double()
    within = 0.5 * (torch.cov(q.T) + torch.cov(p.T))
    within.diagonal().mul_(1 + RIDGE).add_(1e-9)
    return torch.linalg.solve(within, q.mean(0) - p.mean(0)).to(at_q.dtype)
