"""Sliced Wasserstein distance: how far points must move to become those of another set."""

import math

import torch
from torch import Generator, Tensor

from ncprior.numerics import Estimate

NUMBERS_AT_ONCE = 1 << 22  # of projections, 32 MiB


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, directions: int = 200, blocks: int = 20, generator: Generator
) -> Estimate:
    """Sliced Wasserstein-2 distance, the root of the mean of W2^2 along random directions.

    In one dimension W2^2 between two samples of n points is the mean squared difference of the
    sorted points, exactly. As an estimate of the distance between the laws it is too large: between
    equal laws it is of the order of their deviation / sqrt(n), not 0. Compare it with that of two
    sets from the same law, of as many rows.

    Args:
        x: Features (n, f), rows independent of each other.
        y: Features (n, f), as many. Row i may depend on row i of `x`.
        directions: Uniform on the sphere.
        blocks: Of rows, for the standard error: the delete-one-block jackknife over the rows, and
            the spread over directions.
        generator: Of the directions and of which rows make a block, on the CPU.

    Returns:
        The distance in units of the features, and its standard error.

    Raises:
        ValueError: unequal shapes, fewer than two rows to a block, fewer than 2 blocks or
            directions, numbers that are not finite.

    Reference: Bonneel et al. (J. Math. Imaging Vis. 2015), section 3.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2 * blocks or min(blocks, directions) < 2:
        raise ValueError(
            "x and y must both be (n, f), with two rows for each of at least 2 blocks and at least "
            f"2 directions, got {tuple(x.shape)} and {tuple(y.shape)}, {blocks=}, {directions=}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, found NaN or infinity")
    n, size = x.shape
    rays = torch.randn(directions, size, generator=generator, dtype=torch.float64)
    rays = (rays / rays.norm(dim=1, keepdim=True)).to(x.device)
    block_of = torch.randperm(n, generator=generator).to(x.device) % blocks
    along, left_out = [], []
    for part in rays.split(max(1, NUMBERS_AT_ONCE // n)):
        sorted_x, order_x = (part @ x.double().T).sort(1)  # (directions, n)
        sorted_y, order_y = (part @ y.double().T).sort(1)
        along.append((sorted_x - sorted_y).square().mean(1))
        of_x, of_y = block_of[order_x], block_of[order_y]
        kept = [
            (sorted_x[of_x != b].view(len(part), -1) - sorted_y[of_y != b].view(len(part), -1))
            .square()
            .mean(1)
            for b in range(blocks)
        ]
        left_out.append(torch.stack(kept))  # (blocks, directions)
    squared = torch.cat(along)
    value = float(squared.mean().sqrt())
    without = torch.cat(left_out, 1).mean(1).sqrt()
    of_rows = (blocks - 1) * float(without.var(correction=0))
    of_rays = float(squared.var()) / directions / (4 * float(squared.mean())) if value > 0 else 0.0
    return Estimate(value, math.sqrt(of_rows + of_rays))
