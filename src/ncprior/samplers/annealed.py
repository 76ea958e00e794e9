"""Annealed importance sampling with resampling: from the base to a law far from it, in steps."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

LogDensity = Callable[[Tensor, slice], Tensor]
"""z (j, m, *event) for the draws in a slice of range(n) to a log-density in nats, (j, m)."""

PARTICLES, MOVES = 32, 4
BEST_ACCEPTANCE = 0.574  # of Langevin proposals (Roberts and Rosenthal 1998)
ESS_SHARE = 0.5
SMALLEST_RISE = 1e-6  # of a stage, so that one of extreme ratios ends
BISECTIONS = 20
FIRST_STEP = 0.5


class AnnealedResult(NamedTuple):
    samples: Tensor  # (n, *event)
    ess: Tensor  # (n,), the smallest effective pool size on the way, between 1 and m
    log_z: Tensor  # (n,), nats; the mean of its exponential estimates Z
    acceptance: Tensor  # (n,), mean share of the moves that were accepted
    levels: Tensor  # (n,), temperatures passed on the way
    stage_ess: Tensor  # (T, n), the smallest effective pool size in each stage


class Pools(NamedTuple):
    """Particles and how they came about."""

    particles: Tensor  # (j, m, *event)
    log_z: Tensor  # (j,)
    acceptance: Tensor  # (j,)
    levels: Tensor  # (j,)
    stage_ess: Tensor  # (T, j)


def annealed(
    propose: Callable[[int, int, Generator], Tensor],
    log_base: LogDensity,
    log_ratios: Sequence[LogDensity],
    n: int,
    particles: int = PARTICLES,
    *,
    generator: Generator | Sequence[Generator],
    moves: int = MOVES,
    ess_share: float = ESS_SHARE,
    chunk: int = 4096,
) -> AnnealedResult:
    """Sample r_1(z) ... r_T(z) p(z) / Z by a sequential Monte Carlo sampler.

    Each draw has a pool of its own that goes from p to p r_1, from there to p r_1 r_2, and so on.
    Within a stage the exponent of its ratio rises from 0 to 1, each time so far that the effective
    pool size stays at `ess_share`; then the pool is resampled and every particle takes a few
    Metropolis-adjusted Langevin steps, whose size follows their acceptance. The draw is one
    particle of the last pool, and the error of its law is O(1 / particles).

    Args:
        propose: (i, k, generator) to k draws of the base prior for draw i, (k, *event).
        log_base: log p; differentiable.
        log_ratios: log r_1, ..., log r_T, each up to a constant; differentiable.
        n: Number of draws.
        particles: Pool m of each.
        generator: Source of all randomness, on the device of the proposals; or one for each draw,
            which then depends on nothing else.
        moves: Langevin steps at each temperature; twice as many more at the end of each stage.
        ess_share: Effective pool size to keep at each temperature, as a share of m.
        chunk: About how many particles are moved at a time; it changes speed and memory alone.

    Raises:
        ValueError: an argument out of range, a wrong number of generators, or densities that are
            NaN or +inf.

    Reference: Del Moral, Doucet and Jasra (2006), section 3.3.2.3 for the weights; Jasra et al.
        (2011) for the temperatures; Neal (2001).
    """
    if min(n, chunk, moves) < 1 or particles < 2 or not log_ratios or not 0 < ess_share < 1:
        raise ValueError(
            "n, chunk, moves and the number of log_ratios must be at least 1, particles at least "
            f"2 and ess_share between 0 and 1, got {n=}, {chunk=}, {moves=}, {len(log_ratios)} "
            f"log_ratios, {particles=}, {ess_share=}"
        )
    generators = [generator] * n if isinstance(generator, Generator) else list(generator)
    if len(generators) != n:
        raise ValueError(f"generator must be one or {n} (one a draw), got {len(generators)}")

    parts = []
    together = max(1, chunk // particles)
    for first in range(0, n, together):
        draws = slice(first, min(first + together, n))
        own = generators[draws]
        start = torch.stack([propose(i, particles, g) for i, g in enumerate(own, first)])
        pools = anneal(
            start,
            partial(_of, log_base, draws),
            [partial(_of, log_ratio, draws) for log_ratio in log_ratios],
            generators=own,
            moves=moves,
            ess_share=ess_share,
        )
        device = start.device
        picks = [torch.randint(particles, (), generator=g, device=device) for g in own]
        rows = torch.arange(len(own), device=device)
        parts.append((pools.particles[rows, torch.stack(picks)], *pools[1:]))
    samples, log_z, acceptance, levels, stage_ess = (
        torch.cat(part, -1 if i == 4 else 0) for i, part in enumerate(zip(*parts, strict=True))
    )
    return AnnealedResult(samples, stage_ess.amin(0), log_z, acceptance, levels, stage_ess)


def _of(log_density: LogDensity, draws: slice, z: Tensor) -> Tensor:
    return log_density(z, draws)


@torch.no_grad()
def anneal(
    start: Tensor,
    log_base: Callable[[Tensor], Tensor],
    log_ratios: Sequence[Callable[[Tensor], Tensor]],
    *,
    generators: Sequence[Generator],
    moves: int,
    ess_share: float = ESS_SHARE,
) -> Pools:
    """Take pools (j, m, *event) of draws of the base to draws of the base times all ratios.

    Args:
        start: Independent draws of the base.
        log_base: z to log p, (j, m).
        log_ratios: z to log r_t, (j, m).
        generators: One for each pool.
        moves: As in `annealed`.
        ess_share: As in `annealed`.
    """
    j, m = start.shape[:2]
    walk = _Path(log_base, log_ratios)
    z, width = start, _spread(start)
    log_z = torch.zeros(j, dtype=torch.float64, device=start.device)
    step, accepted = torch.full_like(log_z, FIRST_STEP), torch.zeros_like(log_z)
    levels, stage_ess = torch.zeros_like(log_z), log_z.new_full((len(log_ratios), j), m)
    for t, log_ratio in enumerate(log_ratios):
        power = torch.zeros_like(log_z)
        while (rising := power < 1).any():
            log_r = _checked(log_ratio(z), (j, m)).double()
            rise = torch.where(rising, _rise(log_r, 1 - power, ess_share * m), 0)
            log_w = rise[:, None] * log_r
            power = torch.where(power + rise > 1 - 1e-9, 1.0, power + rise)
            weights = log_w.softmax(1)
            stage_ess[t] = torch.minimum(stage_ess[t], 1 / weights.square().sum(1))
            log_z += torch.where(rising, log_w.logsumexp(1) - math.log(m), 0)
            levels += rising
            picks = _systematic(weights, rising, generators)
            resampled = z[torch.arange(j, device=z.device)[:, None], picks]
            scale = torch.maximum(_spread(resampled), 1e-4 * width)
            found, share, size = _move(
                walk.at(t, power), resampled, scale, step, moves, rising, generators
            )
            step = torch.where(rising, size, step)
            z = torch.where(rising.view(-1, *[1] * (z.ndim - 1)), found, z)
            accepted += torch.where(rising, share, 0)
        scale, every = torch.maximum(_spread(z), 1e-4 * width), torch.ones_like(rising)
        z, _, step = _move(walk.at(t, power), z, scale, step, 2 * moves, every, generators)
    return Pools(z, log_z, accepted / levels, levels, stage_ess)


class _Path:
    """log p + log r_1 + ... + power log r_t, and its gradient."""

    def __init__(self, log_base: Any, log_ratios: Sequence[Any]) -> None:
        self.log_base, self.log_ratios = log_base, log_ratios

    def at(self, t: int, power: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """z to the log-density (j, m) of stage t and its gradient (j, m, *event)."""

        def log_density(z: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                last = power[:, None].to(z.dtype) * self.log_ratios[t](z)
                total = self.log_base(z) + last
                for log_ratio in self.log_ratios[:t]:
                    total = total + log_ratio(z)
                (gradient,) = torch.autograd.grad(total.sum(), z)
            return _checked(total.detach(), tuple(z.shape[:2])), gradient

        return log_density


def _move(
    log_density: Callable[[Tensor], tuple[Tensor, Tensor]],
    z: Tensor,
    scale: Tensor,
    step: Tensor,
    moves: int,
    moving: Tensor,
    generators: Sequence[Generator],
) -> tuple[Tensor, Tensor, Tensor]:
    """Metropolis-adjusted Langevin steps; the particles, the share accepted, and the step size."""
    j, m, event = len(z), z.shape[1], z.shape[2:]
    noise = _drawn(torch.randn, (moves, m, *event), generators, moving, z.dtype)
    uniform = _drawn(torch.rand, (moves, m), generators, moving, torch.float64)
    log_p, gradient = log_density(z)
    total = torch.zeros_like(step)
    each = (j, *[1] * (z.ndim - 1))
    for i in range(moves):
        size = step.to(z.dtype).view(each)
        root = size.sqrt() * scale
        there = z + 0.5 * size * scale.square() * gradient + root * noise[:, i]
        log_p_there, gradient_there = log_density(there)
        back = (z - there - 0.5 * size * scale.square() * gradient_there) / root
        log_odds = log_p_there - log_p + 0.5 * _over(noise[:, i].square() - back.square())
        accept = uniform[:, i].log() < log_odds.nan_to_num(nan=-math.inf)
        wide = accept.view(*accept.shape, *[1] * len(event))
        z = torch.where(wide, there, z)
        gradient = torch.where(wide, gradient_there, gradient)
        log_p = torch.where(accept, log_p_there, log_p)
        share = accept.double().mean(1)
        total += share
        step = (step * (share - BEST_ACCEPTANCE).exp()).clamp(1e-6, 4.0)
    return z, total / moves, step


def _rise(log_r: Tensor, most: Tensor, ess: float) -> Tensor:
    """The largest rise of the exponent (j,), up to `most`, at which the pool stays effective."""

    def enough(rise: Tensor) -> Tensor:
        weights = (rise[:, None] * log_r).softmax(1)
        return 1 / weights.square().sum(1) >= ess

    low, high = torch.zeros_like(most), most
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    found = torch.where(enough(most), most, low)
    return torch.minimum(most, found.clamp_min(SMALLEST_RISE))


def _systematic(weights: Tensor, wanted: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Indices (j, m) of the particles to go on with, by systematic resampling (Carpenter 1999)."""
    m = weights.shape[1]
    offset = _drawn(torch.rand, (1,), generators, wanted, weights.dtype)
    points = (torch.arange(m, device=weights.device) + offset) / m
    edges = weights.cumsum(1)
    return torch.searchsorted(edges / edges[:, -1:], points).clamp_max(m - 1)


def _drawn(
    make: Callable[..., Tensor],
    shape: tuple[int, ...],
    generators: Sequence[Generator],
    wanted: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Numbers (j, *shape) from the generators that are wanted; a pool at rest uses up none."""
    options: Any = {"dtype": dtype, "device": wanted.device}
    own = zip(generators, wanted.tolist(), strict=True)
    at_rest = torch.zeros(shape, **options)
    return torch.stack(
        [make(shape, generator=g, **options) if used else at_rest for g, used in own]
    )


def _spread(z: Tensor) -> Tensor:
    """Standard deviation (j, 1, *event) over the particles."""
    return z.std(1, keepdim=True)


def _over(values: Tensor) -> Tensor:
    """Sum over the event of (j, m, *event)."""
    return values.flatten(2).sum(2)


def _checked(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(values.shape) != shape:
        raise ValueError(f"log-densities must have shape {shape}, got {tuple(values.shape)}")
    if not (values < math.inf).all():
        raise ValueError("log_base or a log_ratio is NaN or +inf; its network is not usable")
    return values
