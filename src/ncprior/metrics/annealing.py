"""Annealed importance sampling from a base density p to r p, with Hamiltonian moves."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

TARGET_ACCEPTANCE = 0.8
ADAPTATION = 0.5  # change of log step size per unit of missed acceptance
FIRST_ADAPTATION = 2.0  # the same before the first temperature
FIRST_STEP = 0.5
WARMING = 30  # adaptive moves before the first temperature

LogDensity = Callable[[Tensor], Tensor]


class Schedule(NamedTuple):
    """Temperatures and how large a step is good at each."""

    betas: Tensor  # (T,), rising to 1
    step_sizes: Tensor  # (T,)


class Annealed(NamedTuple):
    """Independent chains from the base to r p."""

    log_weights: Tensor  # (n,) float64: their mean's logarithm estimates log Z
    ends: Tensor  # (n, d): under the weights, draws of r p / Z
    along: Tensor  # (n, further) float64: log r after each move at the end
    acceptance: Tensor  # (T,): share of accepted moves at each


class Moved(NamedTuple):
    """Chains with what is known where they stand."""

    z: Tensor  # (n, d)
    log_p: Tensor  # (n,), of the base
    log_r: Tensor  # (n,)
    slope_p: Tensor  # (n, d), gradient of log p
    slope_r: Tensor  # (n, d), of log r


def anneal(
    log_base: LogDensity,
    log_ratio: LogDensity,
    start: Tensor,
    schedule: Schedule,
    *,
    leapfrog: int = 3,
    further: int = 0,
    generator: Generator,
    on_move: Callable[[int], None] | None = None,
) -> Annealed:
    """Take draws of the base p to p r^beta, beta rising to 1 in T temperatures.

    The weight of a chain is prod_t r(z_{t-1})^(beta_t - beta_{t-1}), with z_t one Hamiltonian move
    from z_{t-1} that leaves p r^beta_t as it is. It is unbiased for Z = E_p[r], whatever the moves
    achieve.

    Args:
        log_base: z (n, d) to the normalised log p(z) in nats, (n,); differentiable.
        log_ratio: z (n, d) to log r(z) in nats, (n,); differentiable.
        start: Independent draws of the base, (n, d).
        schedule: Temperatures and step sizes, fixed beforehand (`tuned_schedule`, on other draws),
            for else weights would be biased.
        leapfrog: Leapfrog steps per move.
        further: Moves at the last temperature after that, for `Annealed.along`.
        generator: Source of all randomness, on the device of `start`.
        on_move: Told the number of moves done, for a progress bar.

    Raises:
        ValueError: no temperatures, or a log-ratio that is not finite at a draw of the base.

    Reference: Neal, Annealed importance sampling (2001); moves: Duane et al. (1987), with Neal
    (2011).
    """
    betas, sizes = schedule.betas.tolist(), schedule.step_sizes.tolist()
    if not betas or leapfrog < 1:
        raise ValueError(
            "schedule must hold at least one temperature and leapfrog must be at least 1, "
            f"got {len(betas)} and {leapfrog}"
        )
    at = _begin(log_base, log_ratio, start)
    log_weights = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    acceptance, along, before = [], [], 0.0
    for t, (beta, size) in enumerate(zip(betas, sizes, strict=True)):
        log_weights += (beta - before) * at.log_r.double()
        before = beta
        at, accepted = _move(log_base, log_ratio, at, beta, size, leapfrog, generator)
        acceptance.append(accepted)
        if on_move is not None:
            on_move(t + 1)
    for t in range(further):
        at, _ = _move(log_base, log_ratio, at, before, sizes[-1], leapfrog, generator)
        along.append(at.log_r.double())
        if on_move is not None:
            on_move(len(betas) + t + 1)
    kept = torch.stack(along, 1) if along else log_weights.new_empty((len(start), 0))
    return Annealed(log_weights, at.z, kept, torch.stack(acceptance))


def tuned_schedule(
    log_base: LogDensity,
    log_ratio: LogDensity,
    start: Tensor,
    temperatures: int,
    *,
    leapfrog: int = 3,
    generator: Generator,
) -> Schedule:
    """A schedule from a few chains: even in length, and four moves of five accepted.

    The length between two temperatures is the integral of the standard deviation of log r, which
    makes each add about the same to the variance of the log-weights. The chains first go through
    temperatures (t / T)^2.

    Args:
        start: Draws of the base, (n, d), at least two, which must not be annealed afterwards.

    The others are those of `anneal`.

    Reference: Gelman and Meng (1998), section 4.3, for the length.
    """
    at, size = _begin(log_base, log_ratio, start), FIRST_STEP
    spreads, sizes = [at.log_r.double().std()], [size]
    grid = torch.arange(temperatures + 1, dtype=torch.float64) / temperatures
    grid = grid**2
    for t in range(-WARMING, temperatures + 1):
        beta = float(grid[max(t, 0)])
        at, accepted = _move(log_base, log_ratio, at, beta, size, leapfrog, generator)
        rate = FIRST_ADAPTATION if t <= 0 else ADAPTATION
        size *= math.exp(rate * (float(accepted) - TARGET_ACCEPTANCE))
        if t > 0:
            spreads.append(at.log_r.double().std())
            sizes.append(size)
    sizes[0] = sizes[1]
    spread = torch.stack(spreads).cpu()
    lengths = 0.5 * (spread[1:] + spread[:-1]) * grid.diff()
    length = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if not float(length[-1]) > 0:  # log r is constant
        length = grid
    even = length[-1] * torch.arange(1, temperatures + 1, dtype=torch.float64) / temperatures
    betas = _interpolated(even, length, grid)
    betas[-1] = 1.0
    return Schedule(betas, _interpolated(betas, grid, torch.tensor(sizes, dtype=torch.float64)))


def _interpolated(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """y at some places, linear between the points (x, y) with x rising."""
    i = torch.searchsorted(x, at).clamp(1, len(x) - 1)
    share = ((at - x[i - 1]) / (x[i] - x[i - 1]).clamp_min(1e-300)).clamp(0, 1)
    return y[i - 1] + share * (y[i] - y[i - 1])


def _begin(log_base: LogDensity, log_ratio: LogDensity, start: Tensor) -> Moved:
    at = _look(log_base, log_ratio, start)
    if not (at.log_r.isfinite().all() and at.log_p.isfinite().all()):
        raise ValueError("log_base or log_ratio is not finite at a draw of the base")
    return at


def _look(log_base: LogDensity, log_ratio: LogDensity, z: Tensor) -> Moved:
    """Both log-densities and their gradients."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_p, log_r = log_base(z), log_ratio(z)
        slope_p, slope_r = (_slope(values, z) for values in (log_p, log_r))
    return Moved(z.detach(), log_p.detach(), log_r.detach(), slope_p, slope_r)


def _slope(values: Tensor, z: Tensor) -> Tensor:
    """The gradients at z, 0 of what does not depend on it, such as the ratio of equal laws."""
    if not values.requires_grad:
        return torch.zeros_like(z)
    (slope,) = torch.autograd.grad(values.sum(), z)
    return slope


@torch.no_grad()
def _move(
    log_base: LogDensity,
    log_ratio: LogDensity,
    at: Moved,
    beta: float,
    size: float,
    leapfrog: int,
    generator: Generator,
) -> tuple[Moved, Tensor]:
    """One Hamiltonian move that leaves p r^beta as it is, and the share of chains it moved."""
    options: Any = {"device": at.z.device, "dtype": at.z.dtype}
    n = len(at.z)
    start = torch.randn(at.z.shape, generator=generator, **options)
    uniform = torch.rand((2, n), generator=generator, **options)
    # Unequal step sizes, so that no chain turns in circles with the length of the path.
    step = size * (0.8 + 0.4 * uniform[0, :, None])

    new, speed = at, start
    for _ in range(leapfrog):
        speed = speed + 0.5 * step * (new.slope_p + beta * new.slope_r)
        new = _look(log_base, log_ratio, new.z + step * speed)
        speed = speed + 0.5 * step * (new.slope_p + beta * new.slope_r)
    gain = (new.log_p - at.log_p).double() + beta * (new.log_r - at.log_r).double()
    gain -= 0.5 * (speed.square() - start.square()).flatten(1).sum(1).double()
    accept = uniform[1].log() < gain  # false where it is NaN
    moved = [
        torch.where(accept.view(-1, *[1] * (a.ndim - 1)), a, b)
        for a, b in zip(new, at, strict=True)
    ]
    return Moved(*moved), accept.double().mean()
