"""Sampling-importance-resampling, with memory that does not grow with the number of proposals."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Generator, Tensor

BLOCK = 1024
"""Proposals asked for at a time. It is part of what is drawn, which `chunk` never is."""
BLOCK_NUMBERS = 1 << 20
NATS = 0.1
"""By how much the law of picks may differ from the target where the pool chooses its size: to first
order any probability is off by a tenth at most, as with ten effective proposals."""
SMALLEST, LARGEST = 16, 1000


def enough_proposals(share: float, nats: float = NATS) -> int:
    """The smallest power of two for which picks follow r p / Z to within `nats`; 16 to 1,000.

    The law p_m of a pick from m proposals has p_m = E[r p / mean of the pool's m ratios], where one
    of them is r itself and the others average to Z. Since 1 / x is convex,

        KL(r p / Z || p_m) <= log(1 + (1 / share - 1) / m),    1 / share = E_p[(r / Z)^2].

    A power of two, so that a share that is off a little gives the same size. Beyond 1,000 nothing
    is promised; more proposals showed in no distance that was measured.

    Args:
        share: Share of proposals that count, ESS / m of large pools; above 0, at most 1 but for
            rounding.
        nats: Bound on the Kullback-Leibler divergence.

    Raises:
        ValueError: share or nats not positive.
    """
    if not (share > 0 and nats > 0):
        raise ValueError(f"share and nats must be positive, got {share} and {nats}")
    needed = max(SMALLEST, (1 / share - 1) / math.expm1(nats))
    return min(LARGEST, 2 ** math.ceil(math.log2(needed)))


def block_for(event_shape: Sequence[int]) -> int:
    """Proposals of that shape to ask for at a time, so that a block holds about a million numbers.

    A function of the shape alone, so that the same seed gives the same draws on every machine.
    """
    return max(16, min(BLOCK, BLOCK_NUMBERS // max(1, math.prod(event_shape))))


class SIRResult(NamedTuple):
    samples: Tensor  # (n, *event)
    ess: Tensor  # (n,), effective pool size, between 1 and m
    log_z: Tensor  # (n,), log of each pool's mean ratio, nats


@torch.no_grad()
def sir(
    propose: Callable[[int, int, Generator], Tensor],
    log_ratio: Callable[[Tensor, slice], Tensor],
    n: int,
    m: int,
    *,
    generator: Generator | Sequence[Generator],
    chunk: int = 4096,
    block: int = BLOCK,
) -> SIRResult:
    """Sample r(z) p(z) / Z by sampling-importance-resampling.

    Each of the n draws is picked from a pool of its own, so draws are independent; the error of
    their law is O(1/m). Pools are streamed: with Gumbel noise g, the pick is the largest
    log r + g so far, so that only a few chunks of proposals are held at a time.

    Args:
        propose: (i, k, generator) to k draws of the base prior for draw i, (k, *event).
        log_ratio: z (j, k, *event) for the draws in a slice of range(n), to log r(z) in nats up to
            a constant, (j, k).
        n: Number of draws.
        m: Proposals per draw.
        generator: Source of all randomness, on the device of the proposals; or one for each draw,
            which then depends on nothing else, neither n nor `chunk`.
        chunk: About how many proposals are weighed at a time, and a quarter of how many are held.
            It changes speed and memory, never the law.
        block: Proposals that are asked for at a time; another value gives other draws.

    Raises:
        ValueError: n, m or chunk below 1, a wrong number of generators, a log_ratio of the wrong
            shape, or a pool whose log-ratios are NaN, +inf or all -inf.

    Reference: Aneja et al. (NeurIPS 2021), section 4.3; Gumbel-max: Maddison et al. (2014).
    """
    if min(n, m, chunk, block) < 1:
        raise ValueError(
            f"n, m, chunk and block must be at least 1, got {n=}, {m=}, {chunk=}, {block=}"
        )
    generators = [generator] * n if isinstance(generator, Generator) else list(generator)
    if len(generators) != n:
        raise ValueError(f"generator must be one or {n} (one a draw), got {len(generators)}")

    together = max(1, 4 * chunk // min(m, block))
    parts, held = [], None
    for first in range(0, n, together):
        draws = slice(first, min(first + together, n))
        streams = [_Stream(propose, i, m, generators[i]) for i in range(n)[draws]]
        *part, held = _resample(streams, log_ratio, draws, m, chunk, block, held)
        parts.append(part)
    return SIRResult(*(torch.cat(part) for part in zip(*parts, strict=True)))


State = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""Best score, its z, largest log-ratio, sum and sum of squares of weights relative to it."""


class _Stream:
    """The stream of one draw: blocks of proposals, each with its uniform numbers."""

    def __init__(
        self, propose: Callable[[int, int, Generator], Tensor], i: int, m: int, generator: Generator
    ) -> None:
        self.propose, self.i, self.m, self.generator = propose, i, m, generator

    def block(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        k = min(size, self.m - first)
        z = self.propose(self.i, k, self.generator)
        uniform = torch.rand(k, generator=self.generator, device=z.device, dtype=torch.float64)
        return z, uniform


def _resample(
    streams: list[_Stream],
    log_ratio: Callable[[Tensor, slice], Tensor],
    draws: slice,
    m: int,
    chunk: int,
    block: int,
    held: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Picks, pool sizes and log mean ratios of a few draws; and the block of memory, for the next.

    Filling one block again and again keeps it in the cache; fresh ones cost more than they hold.
    """
    rows = torch.arange(len(streams))
    state: State | None = None
    for first in range(0, m, block):
        blocks = [stream.block(first, block) for stream in streams]
        k, event = len(blocks[0][0]), blocks[0][0].shape[1:]
        if held is None:
            held = blocks[0][0].new_empty((len(streams), k, *event))
        z = held[: len(streams), :k]  # (j, k, *event)
        torch.stack([block[0] for block in blocks], out=z)
        log_w = _weigh(log_ratio, z, draws, chunk)  # (j, k)
        uniform = torch.stack([block[1] for block in blocks]).to(log_w.dtype)
        exponential = uniform.neg_().log1p_().neg_()  # exact where it is small: where it matters
        score, pick = (log_w - exponential.log_()).max(1)
        top = log_w.amax(1)  # keeps NaN
        if not (top < torch.inf).all():
            raise ValueError("log_ratio returned NaN or +inf; its network is not usable")
        scaled = (log_w - _finite(top)[:, None]).exp()
        new = (score, z[rows, pick], top, scaled.sum(1), scaled.square().sum(1))
        state = new if state is None else _merge(state, new)
    assert state is not None
    _, samples, top, total, squares = state
    if not top.isfinite().all():
        raise ValueError("a pool has only log-ratios of -inf; raise the number of proposals")
    log_z = top.double() + total.double().log() - math.log(m)
    assert held is not None
    return samples, total.square() / squares, log_z, held


def _weigh(
    log_ratio: Callable[[Tensor, slice], Tensor], z: Tensor, draws: slice, chunk: int
) -> Tensor:
    """log r of z (j, k, *event), about `chunk` at a time: some draws, or part of one's block."""
    j, k = z.shape[:2]
    rows, width = max(1, chunk // k), min(k, chunk)
    log_w = torch.empty(j, k, device=z.device, dtype=z.dtype)
    for i in range(0, j, rows):
        some = slice(draws.start + i, min(draws.start + i + rows, draws.stop))
        for first in range(0, k, width):
            piece = z[i : i + rows, first : first + width]
            found = log_ratio(piece, some)
            if found.shape != piece.shape[:2]:
                raise ValueError(
                    f"log_ratio must return shape {tuple(piece.shape[:2])}, "
                    f"got {tuple(found.shape)}"
                )
            log_w[i : i + rows, first : first + width] = found
    return log_w


def _merge(old: State, new: State) -> State:
    """The better pick of two blocks, and their weights on a common scale."""
    better = new[0] > old[0]
    event = better.view(-1, *[1] * (old[1].ndim - 1))
    top = torch.maximum(old[2], new[2])
    floor = _finite(top)
    shrink_old, shrink_new = (old[2] - floor).exp(), (new[2] - floor).exp()
    return (
        torch.where(better, new[0], old[0]),
        torch.where(event, new[1], old[1]),
        top,
        old[3] * shrink_old + new[3] * shrink_new,
        old[4] * shrink_old.square() + new[4] * shrink_new.square(),
    )


def _finite(top: Tensor) -> Tensor:
    """0 where no proposal has any weight yet, so that nothing becomes -inf - -inf."""
    return torch.where(top.isfinite(), top, 0)
