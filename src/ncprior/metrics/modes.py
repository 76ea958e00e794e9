"""Class histograms of samples against those of the data: dropped and favoured modes."""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.numerics import Estimate

RESAMPLES = 1000


class Modes(NamedTuple):
    """How the classes of samples are spread, against those of images."""

    counts: Tensor  # (K,) of samples
    reference: Tensor  # (K,) of images
    total_variation: Estimate
    by_chance: float  # the total variation that equal laws have on average at these counts
    rarest: int  # the class that samples lack most
    ratio: float  # its share of samples over its share of images
    ratio_interval: tuple[float, float]  # 95 % for all classes at once, since the rarest is picked


def class_counts(classes: Tensor, num_classes: int) -> Tensor:
    """How many of each class, (num_classes,), int64.

    Raises:
        ValueError: none at all, or a class out of range.
    """
    if classes.ndim != 1 or classes.dtype != torch.int64 or not len(classes):
        raise ValueError(
            f"classes must be int64 (n,), n at least 1, got {classes.dtype} {tuple(classes.shape)}"
        )
    if classes.min() < 0 or classes.max() >= num_classes:
        raise ValueError(
            f"classes must lie between 0 and {num_classes - 1}, got {int(classes.min())} to "
            f"{int(classes.max())}"
        )
    return classes.bincount(minlength=num_classes)


def wilson(count: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """Interval for a share of `count` in `total` independent draws, within [0, 1].

    Reference: Wilson (1927).
    """
    if not 0 <= count <= total or total < 1:
        raise ValueError(f"count must be between 0 and total, got {count} of {total}")
    z = _quantile(level)
    centre = (count + z**2 / 2) / (total + z**2)
    width = z * math.sqrt(count * (total - count) / total + z**2 / 4) / (total + z**2)
    return max(0.0, centre - width), min(1.0, centre + width)


def compare_modes(counts: Tensor, reference: Tensor, *, generator: Generator) -> Modes:
    """Compare the class histogram of samples with that of images.

    Both are to come from the same classifier: what it gets wrong it gets wrong in both. Total
    variation is half of the sum of differences of shares; it is never negative, and positive by
    chance alone, which `by_chance` says for equal laws. Its error comes from resampling both.

    Args:
        counts: Of samples, (K,).
        reference: Of images, (K,).
        generator: Of the resampling, on the CPU.

    Raises:
        ValueError: histograms of different length, or empty.
    """
    if counts.shape != reference.shape or counts.ndim != 1 or len(counts) < 2:
        raise ValueError(
            "counts and reference must both be (K,) with K of at least 2, got "
            f"{tuple(counts.shape)} and {tuple(reference.shape)}"
        )
    n, m = int(counts.sum()), int(reference.sum())
    if min(n, m) < 1 or min(int(counts.min()), int(reference.min())) < 0:
        raise ValueError(
            f"counts and reference must not be empty nor negative, got {n} and {m} in all"
        )
    p, q = counts.double() / n, reference.double() / m
    found = float((p - q).abs().sum() / 2)
    resampled = _total_variation(_redrawn(p, n, generator), _redrawn(q, m, generator))
    pooled = (counts + reference).double() / (n + m)
    equal = _total_variation(_redrawn(pooled, n, generator), _redrawn(pooled, m, generator))

    there = reference > 0
    ratios = torch.where(there, p / q, torch.inf)
    rarest = int(ratios.argmin())
    interval = _ratio_interval(
        int(counts[rarest]), n, int(reference[rarest]), m, 1 - 0.05 / int(there.sum())
    )
    return Modes(
        counts,
        reference,
        Estimate(found, float(resampled.std())),
        float(equal.mean()),
        rarest,
        float(ratios[rarest]),
        interval,
    )


def _redrawn(shares: Tensor, total: int, generator: Generator) -> Tensor:
    """Shares in RESAMPLES multinomial draws, (RESAMPLES, K), by binomials in turn."""
    left = torch.full((RESAMPLES,), float(total), dtype=torch.float64)
    rest, found = 1.0, []
    for share in shares.tolist():
        p = min(1.0, share / rest) if rest > 0 else 0.0
        drawn = torch.binomial(left, torch.full_like(left, p), generator=generator)
        found.append(drawn)
        left, rest = left - drawn, rest - share
    return torch.stack(found, 1) / total


def _total_variation(p: Tensor, q: Tensor) -> Tensor:
    return (p - q).abs().sum(-1) / 2


def _ratio_interval(a: int, n: int, b: int, m: int, level: float) -> tuple[float, float]:
    """Interval for (a / n) / (b / m), from the Wilson intervals of both shares.

    Reference: Donner and Zou (2012), method of variance estimates recovery on the logarithm.
    """
    (low_p, high_p), (low_q, high_q) = wilson(a, n, level), wilson(b, m, level)
    p, q = a / n, b / m
    # On the log scale; the lower end of a share of 0 is 0.
    log_q = math.log(q)
    spread_down = (log_q - math.log(high_q)) ** 2
    spread_up = (log_q - math.log(low_q)) ** 2
    if a == 0:
        return 0.0, math.exp(math.log(high_p) - log_q + math.sqrt(spread_up))
    log_p = math.log(p)
    low = log_p - log_q - math.sqrt((log_p - math.log(low_p)) ** 2 + spread_down)
    high = log_p - log_q + math.sqrt((log_p - math.log(high_p)) ** 2 + spread_up)
    return math.exp(low), math.exp(high)


def _quantile(level: float) -> float:
    """The z of a two-sided interval, 1.96 at 95 %."""
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
