"""Is one law another? Maximum mean discrepancy with several bandwidths and a permutation p-value.

Labels are permuted, never kernels: a kernel matrix is computed once, and all permutations of the
labels are one matrix product with it.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.metrics.kernel import median_bandwidth
from ncprior.numerics import Estimate

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Factors on the median bandwidth."""


class KernelTest(NamedTuple):
    """A discrepancy and how unlikely it is where both laws are the same."""

    value: float  # MMD^2 under the mean of the kernels, unbiased
    se: float  # its delete-one jackknife standard error
    p_value: float  # (1 + number of permutations as extreme) / (1 + permutations)
    of_kernels: tuple[float, ...]  # MMD^2 under each kernel


def mmd_test(
    x: Tensor,
    y: Tensor,
    *,
    bandwidths: Sequence[float] | None = None,
    permutations: int = 500,
    paired: bool = False,
    generator: Generator,
) -> KernelTest:
    """Unbiased MMD^2 between the laws of x and y under Gaussian kernels of several widths.

    One bandwidth sees only differences of its own size; the test takes the largest of all, in units
    of what permutations give, so that nobody chooses.

    Args:
        x: Features (n, f), rows independent of each other.
        y: Features (m, f).
        bandwidths: Of the kernels exp(-|a - b|^2 / (2 s^2)), in units of the features; by default
            the median distance within both times 1/4, 1/2, 1, 2 and 4. Those given must not come
            from these rows, or must not change when x and y are exchanged.
        permutations: Of the labels.
        paired: As in `kernel_test`.
        generator: Of the permutations, on the CPU.

    Raises:
        ValueError: fewer than 3 rows, shapes that do not go together, numbers that are not finite,
            a bandwidth that is not positive, or fewer than 1 permutation.

    Reference: Gretton et al. (JMLR 2012), Lemma 6; several kernels in one test: Schrab et al. (JMLR
    2023), whose weights and level per kernel are one standardised maximum here.
    """
    _check_features(x, y)
    if bandwidths is None:
        bandwidths = [scale * median_bandwidth(x, y) for scale in SCALES]
    if not bandwidths or not all(0 < s < math.inf for s in bandwidths):
        raise ValueError(f"bandwidths must be positive numbers, got {list(bandwidths)}")
    pooled = torch.cat([x, y]).double()
    pooled = pooled - pooled.mean(0)  # nothing cancels then that should not
    squares = pooled.square().sum(1)
    distances = (squares[:, None] + squares - 2 * pooled @ pooled.T).clamp_min_(0)  # squared
    kernels = ((distances / (-2 * s**2)).exp_() for s in bandwidths)
    return kernel_test(
        kernels, len(x), permutations=permutations, paired=paired, generator=generator
    )


def kernel_test(
    kernels: Iterable[Tensor],
    n: int,
    *,
    permutations: int = 500,
    paired: bool = False,
    generator: Generator,
) -> KernelTest:
    """The same for any kernels, given as matrices.

    The statistic is the largest MMD^2 of all kernels, each in standard deviations from its mean
    over all permutations, the labels as they are among them. That treats these labels as any
    others, so that the level is exact for every number of rows and permutations: under equal laws
    P(p <= a) is at most a.

    Args:
        kernels: Matrices (n + m, n + m) over the pooled rows, one at a time.
        n: How many of the rows are x; they come first.
        permutations: Of the labels.
        paired: Row i of x and row i of y were drawn given the same thing (a context, an image).
            Then they are exchanged with each other only, and k(x_i, y_i) is left out, so that the
            estimate stays unbiased; n and m must be equal.
        generator: Of the permutations, on the CPU.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    found: list[Tensor] = []
    labels, mean_kernel = None, None
    for kernel in kernels:
        total = len(kernel)
        if paired and total != 2 * n:
            raise ValueError(f"pairs need as many rows of x as of y, got {n} and {total - n}")
        if labels is None:
            labels = _labels(n, total - n, permutations, paired, generator).to(kernel)
        found.append(_paired(kernel, labels) if paired else _unbiased(kernel, labels, n))
        mean_kernel = kernel if mean_kernel is None else mean_kernel + kernel
    if mean_kernel is None:
        raise ValueError("kernels must hold at least one matrix, got none")
    values = torch.stack(found)  # (kernels, 1 + permutations), the labels as they are first
    spread = values.std(1, correction=0, keepdim=True)
    scores = ((values - values.mean(1, keepdim=True)) / spread.clamp_min(1e-300)).amax(0)
    # Equal labels must tie with themselves whatever the rounding; ties count against rejection.
    as_extreme = int((scores[1:] >= scores[0] - 1e-9).sum())
    estimate = _jackknife(mean_kernel / len(found), n, paired)
    p_value = (1 + as_extreme) / (1 + permutations)
    return KernelTest(estimate.value, estimate.se, p_value, tuple(values[:, 0].tolist()))


def _labels(n: int, m: int, count: int, paired: bool, generator: Generator) -> Tensor:
    """Labels to try, the true ones first: signs of pairs (n, 1 + count), else 1 for x (n + m, ...).

    A random order of the rows gives a random choice of n of them.
    """
    if paired:
        signs = 2 * torch.randint(2, (n, count + 1), generator=generator) - 1
        signs[:, 0] = 1
        return signs
    order = torch.rand(n + m, count + 1, generator=generator).argsort(0)
    chosen = torch.zeros(n + m, count + 1).scatter_(0, order[:n], 1.0)
    chosen[:, 0] = (torch.arange(n + m) < n).float()
    return chosen


def _unbiased(kernel: Tensor, labels: Tensor, n: int) -> Tensor:
    """Unbiased MMD^2 for each column of labels, from one product."""
    m = len(kernel) - n
    diagonal = kernel.diagonal()
    product = kernel @ labels  # (n + m, 1 + permutations)
    to_x = product.sum(0)
    within_x = (labels * product).sum(0)
    between = to_x - within_x
    within_y = kernel.sum() - to_x - between
    of_x = diagonal @ labels
    of_y = diagonal.sum() - of_x
    return (
        (within_x - of_x) / (n * (n - 1))
        + (within_y - of_y) / (m * (m - 1))
        - 2 * between / (n * m)
    )


def _paired(kernel: Tensor, signs: Tensor) -> Tensor:
    """The same where pairs are exchanged: H_ij changes its sign with either of i and j."""
    h = _pair_terms(kernel)
    return (signs * (h @ signs)).sum(0) / (len(h) * (len(h) - 1))


def _pair_terms(kernel: Tensor) -> Tensor:
    """k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i) without i = j, (n, n)."""
    n = len(kernel) // 2
    between = kernel[:n, n:]
    return (kernel[:n, :n] + kernel[n:, n:] - between - between.T).fill_diagonal_(0)


def _jackknife(kernel: Tensor, n: int, paired: bool) -> Estimate:
    """MMD^2 and its error by leaving out each row, or each pair, in closed form."""
    if paired:
        terms = _pair_terms(kernel).sum(1) / (n - 1)
        se = 2 * (n - 1) / (n - 2) * float(terms.std()) / math.sqrt(n)
        return Estimate(float(terms.mean()), se)
    m = len(kernel) - n
    within_x, within_y, between = kernel[:n, :n], kernel[n:, n:], kernel[:n, n:]
    of_x = within_x.sum(1) - within_x.diagonal()  # (n,), sums over the others
    of_y = within_y.sum(1) - within_y.diagonal()
    a, b, c = of_x.sum(), of_y.sum(), between.sum()
    value = a / (n * (n - 1)) + b / (m * (m - 1)) - 2 * c / (n * m)
    mean_x, mean_y = a / (n * (n - 1)), b / (m * (m - 1))
    less_x = (a - 2 * of_x) / ((n - 1) * (n - 2)) + mean_y
    less_x -= 2 * (c - between.sum(1)) / ((n - 1) * m)
    less_y = mean_x + (b - 2 * of_y) / ((m - 1) * (m - 2))
    less_y -= 2 * (c - between.sum(0)) / (n * (m - 1))
    variance = (n - 1) * less_x.var(correction=0) + (m - 1) * less_y.var(correction=0)
    return Estimate(float(value), math.sqrt(float(variance)))


def _check_features(x: Tensor, y: Tensor) -> None:
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            "x and y must be (n, f) and (m, f) with at least 3 rows each, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, found NaN or infinity")
