"""Maximum mean discrepancy between two sets of features, unbiased, with its jackknife error."""

import math

import torch
from torch import Tensor

from ncprior.numerics import Estimate

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
