"""How heavy the right tail of importance weights is: the Pareto shape k-hat.

Moments of order above 1/k do not exist. With k above 0.5 the variance of a mean of weights is
infinite, above 0.7 its error is no longer what the sample says, above 1 there is no mean at all.
"""

import math

import torch
from torch import Tensor

DOUBTFUL, UNRELIABLE = 0.7, 1.0
FEWEST = 5  # weights in a tail that can be fitted
SPREAD = 1e-6  # relative; below it the largest weights differ by rounding alone


def tail_size(num: int) -> int:
    """Weights of `num` that count as the tail: min(num / 5, 3 sqrt(num))."""
    return min(num // 5, math.ceil(3 * math.sqrt(num)))


def pareto_k(log_weights: Tensor) -> float | None:
    """k-hat of log-weights (m,); None where there is no tail to fit (see `tail_shape`)."""
    size = tail_size(log_weights.numel())
    if size < FEWEST:
        return None
    largest = log_weights.double().flatten().topk(size + 1).values
    shape = float(tail_shape(largest[:, None]))
    return None if math.isnan(shape) else shape


def tail_shape(largest: Tensor) -> Tensor:
    """k-hat of each column of the largest M + 1 log-weights (M + 1, n), falling; (n,).

    A generalised Pareto density is fitted to how much the M largest weights exceed the next one,
    and shrunk towards 0.5 as if by ten more weights. NaN where M is below 5 or the weights are
    the same.

    Reference: Zhang and Stephens (2009); Vehtari et al., Pareto smoothed importance sampling
    (JMLR 2024), appendix G.
    """
    count = len(largest) - 1
    if count < FEWEST:
        return torch.full(largest.shape[1:], math.nan, dtype=torch.float64)
    weights = (largest.double() - largest[0].double()).exp().flip(0).T  # (n, M + 1), rising to 1
    excess = weights[:, 1:] - weights[:, :1]
    quartile = excess[:, int(count / 4 + 0.5) - 1]
    usable = (excess[:, -1] > SPREAD) & (quartile > 0)
    excess = torch.where(usable[:, None], excess, 1.0)
    quartile = torch.where(usable, quartile, 1.0)

    guesses = 30 + int(math.sqrt(count))
    steps = torch.arange(1, guesses + 1, dtype=torch.float64, device=excess.device) - 0.5
    b = (1 - (guesses / steps).sqrt()) / (3 * quartile[:, None]) + 1 / excess[:, -1:]  # (n, g)
    shapes = torch.stack([torch.log1p(-one[:, None] * excess).mean(1) for one in b.T], 1)
    fit = count * ((-b / shapes).log() - shapes - 1)
    best = (fit.softmax(1) * b).sum(1)
    shape = torch.log1p(-best[:, None] * excess).mean(1)
    shape = (count * shape + 10 * 0.5) / (count + 10)
    return torch.where(usable, shape, math.nan)
