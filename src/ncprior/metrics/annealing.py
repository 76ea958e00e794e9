"""Annealed importance sampling from a base density p to r p, with Hamiltonian moves."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

TARGET_ACCEPTANCE = 0.8
ADAPTATION = 0.5  # change of log step size per unit of missed acceptance
FIRST_STEP = 0.5
WARMING = 30  # adaptive moves before the first temperature

LogDensity = Callable[[Tensor], Tensor]


class Annealed(NamedTuple):
    """Independent chains from the base to r p."""

    log_weights: Tensor  # (n,) float64: their mean's logarithm estimates log Z
    ends: Tensor  # (n, d): under the weights, draws of r p / Z
    along: Tensor  # (n, further) float64: log r after each move at the end
    acceptance: Tensor  # (temperatures,): share of accepted moves at each


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
    step_sizes: Tensor,
    *,
    leapfrog: int = 3,
    further: int = 0,
    generator: Generator,
    on_move: Callable[[int], None] | None = None,
) -> Annealed:
    """Take draws of the base p to p r^beta, beta rising evenly to 1 in T temperatures.

    The weight of a chain is prod_t r(z_{t-1})^(1/T), with z_t one Hamiltonian move from z_{t-1}
    that leaves p r^(t/T) as it is. It is unbiased for Z = E_p[r], whatever the moves achieve.

    Args:
        log_base: z (n, d) to the normalised log p(z) in nats, (n,); differentiable.
        log_ratio: z (n, d) to log r(z) in nats, (n,); differentiable.
        start: Independent draws of the base, (n, d).
        step_sizes: Of the moves at each temperature, (T,); fixed beforehand (`tuned_step_sizes`,
            on other draws), for else weights would be biased.
        leapfrog: Leapfrog steps per move.
        further: Moves at the last temperature after that, for `Annealed.along`.
        generator: Source of all randomness, on the device of `start`.
        on_move: Told the number of moves done, for a progress bar.

    Raises:
        ValueError: no temperatures, or a log-ratio that is not finite at a draw of the base.

    Reference: Neal, Annealed importance sampling (2001); moves: Duane et al. (1987), with Neal
    (2011).
    """
    if not len(step_sizes) or leapfrog < 1:
        raise ValueError(
            "step_sizes must hold at least one temperature and leapfrog must be at least 1, "
            f"got {len(step_sizes)} and {leapfrog}"
        )
    at, num = _begin(log_base, log_ratio, start), len(step_sizes)
    log_weights = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    acceptance, along = [], []
    for t in range(num + further):
        if t < num:
            log_weights += at.log_r.double() / num
        beta, size = min(1.0, (t + 1) / num), float(step_sizes[min(t, num - 1)])
        at, accepted = _move(log_base, log_ratio, at, beta, size, leapfrog, generator)
        if t < num:
            acceptance.append(accepted)
        else:
            along.append(at.log_r.double())
        if on_move is not None:
            on_move(t + 1)
    kept = torch.stack(along, 1) if along else log_weights.new_empty((len(start), 0))
    return Annealed(log_weights, at.z, kept, torch.stack(acceptance))


def tuned_step_sizes(
    log_base: LogDensity,
    log_ratio: LogDensity,
    start: Tensor,
    temperatures: int,
    *,
    leapfrog: int = 3,
    generator: Generator,
) -> Tensor:
    """Step sizes (temperatures,) at which four moves of five are accepted, found on a few chains.

    Args:
        start: Draws of the base, (n, d), which must not be annealed again afterwards.

    The others are those of `anneal`.
    """
    at, size, found = _begin(log_base, log_ratio, start), FIRST_STEP, []
    for t in range(-WARMING, temperatures):
        beta = max(0.0, (t + 1) / temperatures)
        at, accepted = _move(log_base, log_ratio, at, beta, size, leapfrog, generator)
        rate = 2.0 if t < 0 else ADAPTATION
        size *= math.exp(rate * (float(accepted) - TARGET_ACCEPTANCE))
        if t >= 0:
            found.append(size)
    return torch.tensor(found, dtype=torch.float64)


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
        (slope_p,) = torch.autograd.grad(log_p.sum(), z)
        (slope_r,) = torch.autograd.grad(log_r.sum(), z)
    return Moved(z.detach(), log_p.detach(), log_r.detach(), slope_p, slope_r)


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
