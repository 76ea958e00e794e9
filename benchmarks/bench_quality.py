"""Frechet distance against torchmetrics, nearest training images, and other sample measures.

python benchmarks/bench_quality.py [IMAGES] [FEATURES]

By default 50,000 x 2,048 features, which the comparison makes in batches: no set is in memory.
Each way runs in a process of its own, so that the peak of memory is its own; the times are the
processor's, less that of making the features, because other work on a machine stretches wall time.
"""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from common import show

from ncprior.metrics import frechet_distance, nearest
from ncprior.metrics.frechet import streamed_moments

BATCH = 500


def batches(images: int, features: int, seed: int) -> Iterator[torch.Tensor]:
    """Correlated features in single precision, the same at every call."""
    generator = torch.Generator().manual_seed(seed)
    shift = torch.randn(features, generator=generator)
    for _ in range(images // BATCH):
        yield torch.randn(BATCH, features, generator=generator).cumsum(1) / features**0.5 + shift


class Cost(NamedTuple):
    """What a function gave and what it took."""

    value: float
    seconds: float  # of the processor
    held: float  # MiB beyond what the process held before


def making(images: int, features: int) -> float:
    return sum(len(b) for seed in (0, 1) for b in batches(images, features, seed))


def ours(images: int, features: int) -> float:
    a, b = (streamed_moments(batches(images, features, seed)) for seed in (0, 1))
    return frechet_distance([a], [b])


def theirs(images: int, features: int) -> float:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Module):
        num_features = features

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1)

    metric = FrechetInceptionDistance(Flat(), normalize=True, input_img_size=(1, 1, features))
    metric.set_dtype(torch.float64)
    for seed, real in ((0, True), (1, False)):
        for part in batches(images, features, seed):
            metric.update(part.double().view(BATCH, 1, 1, features), real=real)
    return float(metric.compute())


def cost(function: Callable[[int, int], float], images: int, features: int) -> Cost:
    function(2 * BATCH, 16)  # imports and first calls
    before, began = memory(), time.process_time()
    value = function(images, features)
    return Cost(value, time.process_time() - began, memory() - before)


def memory() -> float:
    """The most memory this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def timed(function: Callable[[], object]) -> float:
    """The seconds of a function."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def alone(function: Callable[[int, int], float], images: int, features: int) -> Cost:
    """`cost` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost, (function, images, features))


def main() -> None:
    images, features = (int(v) for v in (sys.argv[1:3] + ["50000", "2048"][len(sys.argv) - 1 :]))
    made, found, expected = (alone(f, images, features) for f in (making, ours, theirs))
    seconds, their_seconds = found.seconds - made.seconds, expected.seconds - made.seconds
    matrix = features**2 * 8 / 2**20
    show(
        f"Frechet distance, twice {images:,} x {features:,}",
        [
            ("ours", f"{seconds:.1f} s"),
            ("torchmetrics", f"{their_seconds:.1f} s"),
            ("torchmetrics / ours", f"{their_seconds / seconds:.2f} times as fast"),
            ("difference", f"{abs(found.value / expected.value - 1):.1e} of the value"),
            ("memory beyond the start, ours", f"{found.held:.0f} MiB"),
            ("memory beyond the start, torchmetrics", f"{expected.held:.0f} MiB"),
            ("one matrix of features x features", f"{matrix:.0f} MiB"),
            ("all features would be", f"{2 * images * features * 8 / 2**20:,.0f} MiB"),
        ],
    )

    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(1000, 784, generator=generator)
    references = torch.rand(60_000, 784, generator=generator)
    whole = torch.empty(1000, 60_000)
    seconds, product = (
        timed(f)
        for f in (
            lambda: nearest(queries, references, 5),
            lambda: torch.mm(queries, references.T, out=whole),
        )
    )
    show(
        "5 nearest of 60,000 references of 784 numbers, for 1,000 queries, exact",
        [
            ("ours", f"{seconds:.1f} s"),
            ("the matrix product alone", f"{product:.1f} s"),
        ],
    )


if __name__ == "__main__":
    main()
