"""Whether log r means what it says: predicted against observed log-odds, bin by bin."""

from typing import NamedTuple

import torch
from torch import Tensor

Z_95 = 1.959964


class Reliability(NamedTuple):
    """Bins of log r, rising; each in nats, (b,) in float64."""

    predicted: Tensor  # log of the odds of q against p in the bin, if log r is right
    observed: Tensor  # the same from how many draws of each there are
    low: Tensor  # 95 % interval of the observed
    high: Tensor
    count_q: Tensor  # (b,), int64
    count_p: Tensor

    @property
    def error(self) -> float:
        """Mean |predicted - observed| in nats, weighted by the draws in the bins."""
        counts = (self.count_q + self.count_p).double()
        return float(((self.predicted - self.observed).abs() * counts).sum() / counts.sum())


def reliability(log_ratio_at_q: Tensor, log_ratio_at_p: Tensor, bins: int = 20) -> Reliability:
    """Observed against predicted log-odds of q over p at held-out draws of both.

    Draws are put into bins of equal numbers by their log r. If log r is right, a draw is one of q
    with the odds r (at equal numbers of both); the prediction of a bin is the log-odds of the mean
    probability in it. For calibrated ratios predicted and observed agree in every bin, up to the
    interval. It takes draws alone, so that it works where densities are not known.

    Args:
        log_ratio_at_q: log r = log q / p in nats at independent draws of q, (n,).
        log_ratio_at_p: The same at draws of p, (m,); m need not be n.
        bins: Number of bins, fewer where log r repeats itself.

    Returns:
        Observed log-odds with half a draw added to each count, and their interval from the standard
        error of a log of a ratio of counts.

    Raises:
        ValueError: no bins, fewer draws than bins, or a log-ratio that is NaN.

    Reference: Niculescu-Mizil and Caruana (2005) for the diagram; Haldane (1956) for the half.
    """
    values = torch.cat([log_ratio_at_q.flatten(), log_ratio_at_p.flatten()]).double().cpu()
    n, m = log_ratio_at_q.numel(), log_ratio_at_p.numel()
    if bins < 1 or min(n, m) < bins:
        raise ValueError(
            f"bins must be at least 1 and at most the draws of either, got {bins} bins for "
            f"{n} draws of q and {m} of p"
        )
    if values.isnan().any():
        raise ValueError("log_ratio has NaN; its network is not usable")
    of_q = torch.arange(n + m) < n
    weight = torch.where(of_q, 0.5 / n, 0.5 / m).double()  # equal odds before anything is seen
    edges = values.sort().values[torch.arange(1, bins) * (n + m) // bins].unique()
    place = torch.bucketize(values, edges, right=True)

    def per_bin(of: Tensor) -> Tensor:
        return torch.zeros(len(edges) + 1, dtype=of.dtype).index_add_(0, place, of)

    count_q, count_p = per_bin(of_q.long()), per_bin((~of_q).long())
    kept = count_q + count_p > 0
    probability = per_bin(weight * values.sigmoid())
    complement = per_bin(weight * (-values).sigmoid())
    count_q, count_p = count_q[kept], count_p[kept]
    some_q, some_p = count_q + 0.5, count_p + 0.5
    observed = (some_q / n).log() - (some_p / m).log()
    se = (1 / some_q - 1 / (n + 1) + 1 / some_p - 1 / (m + 1)).double().sqrt()
    return Reliability(
        (probability / complement).log()[kept],
        observed.double(),
        observed - Z_95 * se,
        observed + Z_95 * se,
        count_q,
        count_p,
    )
