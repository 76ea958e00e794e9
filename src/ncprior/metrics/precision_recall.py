"""Precision, recall, density and coverage of samples, with jackknife errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.metrics.features import check_features
from ncprior.numerics import Estimate

NUMBERS_AT_ONCE = 1 << 22  # of a matrix of distances, 32 MiB
BLOCKS = 10


class PrecisionRecall(NamedTuple):
    """Shares between 0 and 1, but for density, which may exceed 1."""

    precision: Estimate  # samples that lie in the ball of a real image
    recall: Estimate  # real images that lie in the ball of a sample
    density: Estimate  # balls of real images around a sample, in units of k; 1 for equal laws
    coverage: Estimate  # real images with a sample in their ball


def prdc(real: Tensor, samples: Tensor, *, k: int = 5, blocks: int = BLOCKS) -> PrecisionRecall:
    """What share of samples looks real, and what share of the real images they reach.

    The ball of a point reaches to its k-th nearest neighbour in its own set. All four figures
    depend on the numbers of points: compare them at equal numbers. For equal laws and as many
    samples as real images density is 1 and coverage 1 - 2^-k on average, in any space.

    Distances are exact; memory does not grow with the square of the numbers. The errors are those
    of the jackknife, which for neighbours is on the safe side: in simulations 1.0 to 2.1 times the
    true spread, most where figures are near 1. (The error of a mean of independent points, often
    quoted, is 0.4 to 0.9 times it.)

    Args:
        real: Features of real images (n, f).
        samples: Features of samples (m, f).
        k: Neighbours that make a ball.
        blocks: Blocks that the jackknife leaves out of each set in turn, at most 20.

    Raises:
        ValueError: features of unequal width or not finite, k or blocks out of range, or most balls
            without a radius, since k neighbours of most points are the same point.

    Reference: Kynkaanniemi et al. (NeurIPS 2019), Eqs. 1 and 2; Naeem et al. (ICML 2020), Eqs. 3
    and 4. Balls include their border.
    """
    for features, name in ((real, "real"), (samples, "samples")):
        check_features(features, name)
    if real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"real and samples must have as many features, got {tuple(real.shape)} and "
            f"{tuple(samples.shape)}"
        )
    least = min(len(real), len(samples))
    if k < 1 or not 2 <= blocks <= 20 or least - -(-least // blocks) <= k:
        raise ValueError(
            "k must be at least 1, blocks between 2 and 20, and more than k points remain without "
            f"a block, got {k=}, {blocks=} with {len(real)} and {len(samples)} points"
        )
    centre = real.double().mean(0)  # nothing cancels then that should not
    x, y = real.double() - centre, samples.double() - centre
    radii_x, radii_y = _radii(x, k, blocks), _radii(y, k, blocks)  # (1 + blocks, n), (.., m)
    for points, radii, name in ((x, radii_x, "real"), (y, radii_y, "samples")):
        rounding = 1e-12 * points.square().sum(1).max()  # of squared distances of equal rows
        if (radii[0] <= rounding).double().mean() > 0.5:
            raise ValueError(
                f"{name} must differ from row to row: {k} neighbours of most rows are the same"
            )
    found = _Counts(x, y, radii_x, radii_y, blocks)
    names = PrecisionRecall._fields
    whole = found.figures(None, None, k)
    variance = torch.zeros(4, dtype=torch.float64)
    for left_out in (
        torch.stack([found.figures(j, None, k) for j in range(blocks)]),
        torch.stack([found.figures(None, j, k) for j in range(blocks)]),
    ):
        variance += (blocks - 1) * left_out.var(0, correction=0)
    errors = variance.sqrt().tolist()
    estimates = (Estimate(v, se) for v, se in zip(whole.tolist(), errors, strict=True))
    return PrecisionRecall(**dict(zip(names, estimates, strict=True)))


class _Counts:
    """Who lies in whose ball, counted while the distances go by.

    Row v of a table is of all points (v = 0) or of all but block v - 1 of the set with the balls.
    """

    def __init__(self, x: Tensor, y: Tensor, radii_x: Tensor, radii_y: Tensor, blocks: int) -> None:
        n, m, b = len(x), len(y), blocks
        self.block_x, self.block_y = torch.arange(n) % b, torch.arange(m) % b
        self.balls_around_y = torch.zeros(1 + b, m, dtype=torch.int64)
        self.balls_around_x = torch.zeros(1 + b, n, dtype=torch.bool)
        self.covered = torch.zeros(1 + b, n, dtype=torch.bool)
        self.inside_by_block = torch.zeros(n, b, dtype=torch.int64)  # samples in each real ball
        for rows in torch.arange(n).split(max(1, NUMBERS_AT_ONCE // m)):
            squared = _squared(x[rows], y)  # (r, m)
            i, j, near = _within(squared, radii_x.amax(0)[rows, None])
            radii = radii_x[:, rows]
            for v in range(1 + b):
                inside = near <= radii[v, i]  # never where the centre is left out
                self.balls_around_y[v] += j[inside].bincount(minlength=m)
                self.covered[v, rows] = i[inside].bincount(minlength=len(rows)) > 0
            cells = (i * b + self.block_y[j])[near <= radii[0, i]]
            self.inside_by_block[rows] = cells.bincount(minlength=len(rows) * b).view(-1, b)
            i, j, near = _within(squared, radii_y.amax(0))
            for v in range(1 + b):
                reached = i[near <= radii_y[v, j]]
                self.balls_around_x[v, rows] = reached.bincount(minlength=len(rows)) > 0

    def figures(self, left_x: int | None, left_y: int | None, k: int) -> Tensor:
        """Precision, recall, density and coverage without a block of either set, (4,)."""
        v, w = (0 if left is None else 1 + left for left in (left_x, left_y))
        some_x, some_y = self.block_x != v - 1, self.block_y != w - 1
        balls = self.balls_around_y[v, some_y].double()
        covered = self.covered[v]
        if left_y is not None:
            covered = self.inside_by_block.sum(1) > self.inside_by_block[:, left_y]
        found = [
            (balls > 0).double().mean(),
            self.balls_around_x[w, some_x].double().mean(),
            balls.mean() / k,
            covered[some_x].double().mean(),
        ]
        return torch.stack(found)


def _within(squared: Tensor, most: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where and how large the entries are that are at most `most`: few, as a rule."""
    i, j = (squared <= most).nonzero(as_tuple=True)
    return i, j, squared[i, j]


def _radii(x: Tensor, k: int, blocks: int) -> Tensor:
    """Squared distances to the k-th neighbour, among all and without each block, (1 + blocks, n).

    -1 where the point itself is left out.
    """
    n = len(x)
    block = torch.arange(n) % blocks
    found = torch.empty(1 + blocks, n, dtype=torch.float64)
    for rows in torch.arange(n).split(max(1, NUMBERS_AT_ONCE // n)):
        squared = _squared(x[rows], x)
        squared[torch.arange(len(rows)), rows] = torch.inf
        near, which = squared.topk(min(n - 1, 4 * k + 16), 1, largest=False)  # (r, some)
        found[0, rows] = near[:, k - 1]
        for j in range(blocks):
            left = near.masked_fill(block[which] == j, torch.inf).sort(1).values[:, k - 1]
            for i in (~left.isfinite()).nonzero().flatten():  # nearly all neighbours in one block
                left[i] = squared[i, block != j].kthvalue(k).values
            found[1 + j, rows] = left.masked_fill(block[rows] == j, -1)
    return found


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances between rows of a (n, f) and of b (m, f), (n, m)."""
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_min_(0)
