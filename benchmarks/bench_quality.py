"""Frechet distance against torchmetrics, nearest training images, and other sample measures.

python benchmarks/bench_quality.py [IMAGES] [FEATURES]

By default 50,000 x 2,048 features, which the comparison makes in batches: no set is in memory.
"""

import resource
import sys
import time
from collections.abc import Iterator

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


def timed(function: object) -> tuple[float, float]:
    """What a function gives, and the seconds of it."""
    began = time.perf_counter()
    result = function()  # type: ignore[operator]
    return result, time.perf_counter() - began


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


def memory() -> float:
    """The most memory this process has held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    images, features = (int(v) for v in (sys.argv[1:3] + ["50000", "2048"][len(sys.argv) - 1 :]))
    ours(BATCH * 2, 16)
    before = memory()
    making = sum(
        timed(lambda: sum(len(b) for b in batches(images, features, s)))[1] for s in (0, 1)
    )
    found, seconds = timed(lambda: ours(images, features))
    held = memory() - before
    expected, their_seconds = timed(lambda: theirs(images, features))
    seconds, their_seconds = seconds - making, their_seconds - making
    matrix = features**2 * 8 / 2**20
    show(
        f"Frechet distance, twice {images:,} x {features:,}",
        [
            ("ours", f"{seconds:.1f} s"),
            ("torchmetrics", f"{their_seconds:.1f} s"),
            ("ours / torchmetrics", f"{their_seconds / seconds:.2f} times as fast"),
            ("difference", f"{abs(found / expected - 1):.1e} of the value"),
            ("memory held beyond the start", f"{held:.0f} MiB, {held / matrix:.1f} matrices"),
            ("all features would be", f"{2 * images * features * 8 / 2**20:,.0f} MiB"),
        ],
    )

    generator = torch.Generator().manual_seed(0)
    queries = torch.rand(1000, 784, generator=generator)
    references = torch.rand(60_000, 784, generator=generator)
    _, seconds = timed(lambda: nearest(queries, references, 5))
    whole = torch.empty(1000, 60_000)
    _, product = timed(lambda: torch.mm(queries, references.T, out=whole))
    show(
        "5 nearest of 60,000 references of 784 numbers, for 1,000 queries, exact",
        [
            ("ours", f"{seconds:.1f} s"),
            ("the matrix product alone", f"{product:.1f} s"),
        ],
    )


if __name__ == "__main__":
    main()
