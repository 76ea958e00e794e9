"""Langevin dynamics on an unnormalised density."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

NOISE_STEPS = 16
"""Steps whose noise is drawn at a time."""


class LangevinResult(NamedTuple):
    samples: Tensor  # (n, *event)
    log_density: Tensor  # (steps + 1, n), unnormalised log-density along the way, nats


def langevin(
    log_density: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    step_size: float,
    generator: Generator | Sequence[Generator],
    final_step_size: float | None = None,
    scale: Tensor | float = 1.0,
) -> LangevinResult:
    """Move draws by z <- z + 0.5 lambda s^2 grad log p(z) + sqrt(lambda) s noise.

    With a constant step size this is the paper's update: it is not exact, its stationary law is
    off by O(lambda). An annealed step size ends with small steps and so with a small error.

    Args:
        log_density: z (n, *event) to the unnormalised log-density in nats, (n,); differentiable.
        start: z (n, *event), usually draws of the base prior.
        steps: Number of updates.
        step_size: lambda of the first step.
        generator: Source of the noise, or one for each draw.
        final_step_size: lambda of the last step, reached geometrically; `step_size` by default.
        scale: s, the spread of each coordinate; steps are then taken in the standardised one.

    Raises:
        ValueError: steps or a step size not positive, a wrong number of generators, or a density
            or gradient that is not finite.

    Reference: Aneja et al. (NeurIPS 2021), section 4.3.
    """
    last = step_size if final_step_size is None else final_step_size
    if steps < 1 or not step_size > 0 or not last > 0:
        raise ValueError(
            "steps, step_size and final_step_size must be positive, "
            f"got {steps=}, {step_size=}, {final_step_size=}"
        )
    n = len(start)
    if not isinstance(generator, Generator) and len(generator) != n:
        raise ValueError(f"generator must be one or {n} (one a draw), got {len(generator)}")

    z, trace = start.detach(), []
    for t in range(steps + 1):
        with torch.enable_grad():
            z = z.requires_grad_()
            log_p = log_density(z)
            (gradient,) = torch.autograd.grad(log_p.sum(), z)
        z, log_p = z.detach(), log_p.detach()
        if not (log_p.isfinite().all() and gradient.isfinite().all()):
            raise ValueError(
                f"log_density or its gradient is not finite at step {t}; use a smaller step_size"
            )
        trace.append(log_p)
        if t == steps:
            break
        if t % NOISE_STEPS == 0:
            noise = _noise(start, min(NOISE_STEPS, steps - t), generator)
        size = step_size * (last / step_size) ** (t / max(1, steps - 1))
        z = z + 0.5 * size * scale**2 * gradient + size**0.5 * scale * noise[t % NOISE_STEPS]
    return LangevinResult(z, torch.stack(trace))


def _noise(start: Tensor, steps: int, generator: Generator | Sequence[Generator]) -> Tensor:
    """Standard normal noise (steps, n, *event)."""
    options: Any = {"device": start.device, "dtype": start.dtype}
    if isinstance(generator, Generator):
        return torch.randn((steps, *start.shape), generator=generator, **options)
    rows = [torch.randn((steps, *start.shape[1:]), generator=g, **options) for g in generator]
    return torch.stack(rows, dim=1)
