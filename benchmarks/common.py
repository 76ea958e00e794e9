"""Timing shared by the benchmarks: medians of interleaved repeats, and bare matrix products."""

import statistics
import time
from collections.abc import Callable

import torch


def interleaved(
    functions: dict[str, Callable[[], object]],
    repeats: int = 9,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each function, taken in turn so that drift hits all alike.

    With `time.process_time` as the clock, other work on the machine does not stretch them.
    """
    for function in functions.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            began = clock()
            function()
            times[name].append(clock() - began)
    return {name: statistics.median(found) for name, found in times.items()}


def as_after_reading() -> None:
    """Have memory that is freed kept for the next block, as in a program that has read images.

    A process that has freed no large block gives each one back, and filling fresh pages costs more
    than many an operation; where one was freed, glibc keeps those of its size and smaller.
    """
    torch.empty(7_000_000)


def products(shapes: list[tuple[int, int, int]]) -> Callable[[], None]:
    """The bare matrix products (n, i) x (i, o) of the given shapes, into memory kept for them."""
    work = [(torch.randn(n, i), torch.randn(i, o), torch.empty(n, o)) for n, i, o in shapes]

    def run() -> None:
        for a, b, out in work:
            torch.mm(a, b, out=out)

    return run


def flops(shapes: list[tuple[int, int, int]]) -> int:
    return sum(2 * n * i * o for n, i, o in shapes)


def show(title: str, rows: list[tuple[str, str]]) -> None:
    print(f"\n{title}  ({torch.get_num_threads()} threads, torch {torch.__version__})")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
