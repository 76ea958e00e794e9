"""Numbers that everything else leans on: importance weights, standard errors, seeds."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.tail import pareto_k


class Estimate(NamedTuple):
    """A figure with its standard error."""

    value: float
    se: float


class LogZ(NamedTuple):
    """An estimate of log Z = log E_p[r] in nats."""

    value: float
    se: float  # standard error of `value`, by the delta method
    ess: float  # effective number of draws behind it
    num: int  # draws
    k_hat: float | None = None  # Pareto shape of the weights' tail (`ncprior.tail`)


def log_mean_exp(log_values: Tensor, dim: int = -1) -> Tensor:
    """log of the mean of exp(log_values) along `dim`."""
    return log_values.logsumexp(dim) - math.log(log_values.shape[dim])


def effective_sample_size(log_weights: Tensor, dim: int = -1) -> Tensor:
    """(sum w)^2 / sum w^2 along `dim`, between 1 and the number of weights (Kish 1965)."""
    return (2 * log_weights.logsumexp(dim) - (2 * log_weights).logsumexp(dim)).exp()


def log_z(log_ratio: Tensor) -> LogZ:
    """log Z from log r (m,) at draws of the base prior, in float64.

    The standard error is that of log of a mean: sd(r) / (sqrt(m) mean(r)), which with the effective
    sample size is sqrt(1 / ESS - 1 / m).

    Raises:
        ValueError: NaN, +inf, or nothing but -inf.
    """
    values, num = log_ratio.double(), log_ratio.numel()
    if values.isnan().any() or not values.amax().isfinite():
        raise ValueError("log_ratio has NaN, +inf or only -inf; its network is not usable")
    ess = float(effective_sample_size(values))
    se = math.sqrt(max(1 / ess - 1 / num, 0.0))
    return LogZ(float(log_mean_exp(values)), se, ess, num, pareto_k(values))


def mean_and_se(values: Tensor) -> Estimate:
    """Mean of (n,) independent values and its standard error."""
    values = values.double()
    se = float(values.std() / math.sqrt(values.numel())) if values.numel() > 1 else math.nan
    return Estimate(float(values.mean()), se)


def jackknife(statistic: Callable[..., float], *sources: Sequence[Any]) -> Estimate:
    """A statistic of several independent sources, with its delete-one-block jackknife error.

    Args:
        statistic: Takes one list of blocks per source and returns a figure.
        sources: Lists of exchangeable blocks (at least two each), such as partial sums.

    Reference: Efron and Stein (1981); variances of independent sources add.
    """
    variance = 0.0
    for i, blocks in enumerate(sources):
        count = len(blocks)
        left_out = torch.tensor(
            [
                statistic(*sources[:i], [*blocks[:j], *blocks[j + 1 :]], *sources[i + 1 :])
                for j in range(count)
            ],
            dtype=torch.float64,
        )
        variance += (count - 1) * float(left_out.var(correction=0))
    return Estimate(statistic(*sources), math.sqrt(variance))


def bootstrap_interval(
    *sources: Tensor, generator: Generator, level: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
    """Percentile bootstrap interval for the sum of the means of independent sources (n_i,)."""
    total = torch.zeros(resamples, dtype=torch.float64)
    for values in sources:
        n, values = values.numel(), values.double().cpu()
        for i in range(resamples):
            total[i] += values[torch.randint(n, (n,), generator=generator)].mean()
    tail = (1 - level) / 2
    low, high = total.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def stream_seed(seed: int, purpose: str, index: int = 0) -> int:
    """A seed for stream `index` of `purpose`, so that each use of a user's seed has its own.

    Torch's CPU generator keeps 32 bits of a seed: within a purpose consecutive indices give
    distinct ones, which hashing the index would not.
    """
    return (zlib.crc32(f"{seed}/{purpose}".encode()) + index) % 2**32


def stream(
    seed: int, purpose: str, index: int = 0, device: torch.device | str = "cpu"
) -> Generator:
    """The generator of stream `index` of `purpose`."""
    return Generator(device).manual_seed(stream_seed(seed, purpose, index))


def random_bytes(count: int, generator: Generator | None = None) -> Tensor:
    """Uniform bytes on the CPU, (count,), uint8; drawn eight at a time as whole 64-bit words."""
    words = torch.empty((count + 7) // 8, dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)  # None: up to the largest int64 included
    return words.view(torch.uint8)[:count]
