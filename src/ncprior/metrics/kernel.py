"""Maximum mean discrepancies between two sets of features, unbiased, with their errors."""

import math

import torch
from torch import Tensor

from ncprior.metrics.features import check_features
from ncprior.numerics import Estimate, mean_and_se

NUMBERS_AT_ONCE = 1 << 21  # of a kernel matrix, 16 MiB; about six are held
ROWS_FOR_MEDIAN = 1000


def mmd(x: Tensor, y: Tensor, bandwidth: float | None = None) -> Estimate:
    """Unbiased MMD^2 between the laws of x and y, under a Gaussian (RBF) kernel of height 1.

    The kernel is k(a, b) = exp(-|a - b|^2 / (2 s^2)). It lies between 0 and 1, and so does MMD^2
    up to a factor of 2; an unbiased estimate of 0 is negative half of the time. Values compare only
    at the same bandwidth.

    Args:
        x: Features (n, f). Rows are independent of each other.
        y: Features (n, f), as many. Row i may depend on row i of `x` (draws for the same image, for
            example): such pairs are left out, so that the estimate stays unbiased.
        bandwidth: s, in units of the features; by default `median_bandwidth` of both.

    Returns:
        MMD^2 with its standard error. Where both laws are equal the error is too large by about
        sqrt(2), as always with the jackknife of a degenerate statistic.

    Raises:
        ValueError: fewer than 3 rows, unequal shapes, numbers that are not finite, or a bandwidth
            that is not positive.

    Reference: Gretton et al. (JMLR 2012), Lemma 6, Eq. 4; median heuristic, section 8.
    """
    s = median_bandwidth(x, y) if bandwidth is None else bandwidth
    return mean_of_terms(mmd_terms(x, y, s))


def mmd_terms(x: Tensor, y: Tensor, bandwidth: float) -> Tensor:
    """The term of each row in the unbiased MMD^2, (n,): their mean is the estimate.

    Term i is the mean over j != i of k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i). The
    difference of two MMDs that share rows is `mean_of_terms` of the difference of their terms.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 3:
        raise ValueError(
            "x and y must both be (n, f) with n of at least 3, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("x and y must be finite, found NaN or infinity")
    if not 0 < bandwidth < math.inf:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    centre = x.double().mean(0)  # nothing cancels then that should not
    x, y = x.double() - centre, y.double() - centre
    n, found = len(x), []
    for rows in torch.arange(n, device=x.device).split(max(1, NUMBERS_AT_ONCE // n)):
        total = _kernel(x[rows], x, bandwidth) + _kernel(y[rows], y, bandwidth)
        total -= _kernel(x[rows], y, bandwidth)
        total -= _kernel(y[rows], x, bandwidth)
        total[torch.arange(len(rows), device=x.device), rows] = 0
        found.append(total.sum(1) / (n - 1))
    return torch.cat(found)


def kid(x: Tensor, y: Tensor, *, block_rows: int | None = None) -> Estimate:
    """Kernel distance: unbiased MMD^2 under the kernel (a.b / f + 1)^3, in units of its own.

    Rows of x and y are all independent. An unbiased estimate of 0 is negative half of the time.

    Args:
        x: Features (n, f).
        y: Features (m, f).
        block_rows: None for the U-statistic of all rows, whose jackknife error is too large where
            both laws are equal, so that a test by it alarms too rarely. With a number, the sets are
            dealt into disjoint blocks of about so many rows: the value is the mean over blocks, and
            the error, from their spread, is right for equal laws too. It costs that much less, and
            where laws are equal the value scatters more.

    Returns:
        The distance with its standard error.

    Raises:
        ValueError: fewer than 3 rows, unequal width, rows that are all the same or not finite, or
            fewer than 2 blocks.

    Reference: Binkowski et al. (ICLR 2018), section 4, Eq. 4; Zaremba et al. (NeurIPS 2013) for
    disjoint blocks.
    """
    check_features(x, "x")
    check_features(y, "y")
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 3:
        raise ValueError(
            "x and y must be (n, f) and (m, f) with n and m of at least 3, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    x, y = x.double(), y.double()
    if block_rows is None:
        return _kid(x, y)
    count = min(len(x), len(y)) // max(1, block_rows)
    if block_rows < 3 or count < 2:
        raise ValueError(
            f"block_rows must be at least 3 and leave 2 blocks of {min(len(x), len(y))} rows, got "
            f"{block_rows}"
        )
    found = [_kid(x[i::count], y[i::count]).value for i in range(count)]
    return mean_and_se(torch.tensor(found, dtype=torch.float64))


def _kid(x: Tensor, y: Tensor) -> Estimate:
    n, m = len(x), len(y)
    within_x, within_y = _row_sums(x), _row_sums(y)  # without the diagonal
    x_to_y, y_to_x = _row_sums(x, y), _row_sums(y, x)
    first, second = within_x.sum() / (n * (n - 1)), within_y.sum() / (m * (m - 1))
    cross = x_to_y.sum() / (n * m)
    value = first + second - 2 * cross
    # What is left of the value without row i, for each i at once.
    without_x = (within_x.sum() - 2 * within_x) / ((n - 1) * (n - 2)) + second
    without_x -= 2 * (x_to_y.sum() - x_to_y) / ((n - 1) * m)
    without_y = (within_y.sum() - 2 * within_y) / ((m - 1) * (m - 2)) + first
    without_y -= 2 * (x_to_y.sum() - y_to_x) / ((m - 1) * n)
    variance = (n - 1) * without_x.var(correction=0) + (m - 1) * without_y.var(correction=0)
    return Estimate(float(value), math.sqrt(float(variance)))


def _row_sums(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Sums over b of (a.b / f + 1)^3 for each row of a; without `b`, over the other rows of a."""
    other, found = a if b is None else b, []
    for rows in a.split(max(1, NUMBERS_AT_ONCE // len(other))):
        found.append((rows @ other.T).div_(a.shape[1]).add_(1).pow_(3).sum(1))
    sums = torch.cat(found)
    if b is None:
        sums -= (a.square().sum(1) / a.shape[1] + 1).pow(3)
    return sums


def mean_of_terms(terms: Tensor) -> Estimate:
    """The U-statistic whose rows have these terms (n,), with its delete-one jackknife error.

    Leaving out row i changes it by -2 (term_i - mean) / (n - 2), which gives the jackknife without
    computing anything anew.
    """
    n = len(terms)
    se = 2 * (n - 1) / (n - 2) * float(terms.std()) / math.sqrt(n)
    return Estimate(float(terms.mean()), se)


def median_bandwidth(*features: Tensor) -> float:
    """The median distance between two rows of the pooled features (n_i, f), in their units.

    At most 1000 rows are compared, taken at even steps.

    Raises:
        ValueError: more than half of all pairs are the same point.
    """
    pooled = torch.cat([part.double() for part in features])
    pooled = pooled[:: -(-len(pooled) // ROWS_FOR_MEDIAN)]
    found = float(torch.nn.functional.pdist(pooled).median())
    if found == 0:
        raise ValueError("features must differ from row to row, most are the same")
    return found


def _kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """k between all rows of a (n, f) and b (m, f), (n, m)."""
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_min_(0).div_(-2 * bandwidth**2).exp_()
