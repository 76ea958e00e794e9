"""log Z of a noise contrastive prior on a VAE, in three ways.

All need only log r and the base. For annealing and bridging, latents are written in the coordinate
in which the base is easiest: that of its noise, z_k = mean_k(z_<k) + scale_k(z_<k) eps_k, where all
groups have normal priors, so that the base of the whole hierarchy is N(0, I); else z itself.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.metrics.annealing import LogDensity, anneal, tuned_schedule
from ncprior.metrics.bridge import bridge_log_z
from ncprior.metrics.likelihood import base_log_ratios
from ncprior.normal import LOG_2_PI, Normal
from ncprior.numerics import LogZ, log_z, stream
from ncprior.walk import Group, device_of, from_prior, walk

METHODS = ("base", "ais", "bridge")
PILOTS = 64  # chains on which schedules are tuned
ROWS = 8192


class FlatTarget(NamedTuple):
    """A base density and a ratio on top of it, as functions of flat vectors (n, d)."""

    sample: Callable[[int, Generator], Tensor]  # draws of the base
    log_base: LogDensity
    log_ratio: LogDensity


def flat_target(vae: Any, prior: Any) -> FlatTarget:
    """An NCP and its base over all latents of `vae` at once, differentiable; see the module.

    Args:
        vae: The VAE on the prior's base (`prior.under(vae)`), in evaluation mode.
        prior: A `NoiseContrastivePrior`.

    Raises:
        ValueError: several latent groups whose priors are not all normal.
    """
    seen: list[Group] = []
    drawn = from_prior(Generator(device_of(vae)).manual_seed(0))

    def look(k: int, group: Group) -> Tensor:
        seen.append(group)
        return drawn(k, group)

    with torch.no_grad():
        latents = walk(vae, look, 1).latents
    if all(isinstance(group.prior, Normal) for group in seen):
        return _of_noise(vae, prior, latents)
    if vae.num_groups > 1:
        raise ValueError("several latent groups need normal priors here; use the base draws alone")

    def sample(num: int, generator: Generator) -> Tensor:
        return walk(vae, from_prior(generator), num).latents[0]

    return FlatTarget(
        sample,
        lambda z: vae.group(vae.start(len(z))).prior.log_prob(z),
        lambda z: prior.log_ratio(0, z, vae.group(vae.start(len(z)))),
    )


def _of_noise(vae: Any, prior: Any, latents: Sequence[Tensor]) -> FlatTarget:
    shapes = [z.shape[1:] for z in latents]
    sizes = [math.prod(shape) for shape in shapes]
    like: Any = {"device": latents[0].device, "dtype": latents[0].dtype}

    def log_ratio(noise: Tensor) -> Tensor:
        parts, total = noise.split(sizes, 1), []

        def choose(k: int, group: Group) -> Tensor:
            assert isinstance(group.prior, Normal)
            own = parts[k].unflatten(1, shapes[k])
            z = group.prior.loc + group.prior.scale * own
            total.append(prior.log_ratio(k, z, group))
            return z

        walk(vae, choose, len(noise))
        return torch.stack(total).sum(0)

    return FlatTarget(
        lambda num, generator: torch.randn((num, sum(sizes)), generator=generator, **like),
        lambda noise: -0.5 * (noise.square() + LOG_2_PI).sum(1),
        log_ratio,
    )


def estimate_log_z(
    vae: Any,
    prior: Any,
    methods: Sequence[str] = METHODS,
    *,
    draws: int = 2_000_000,
    chains: int = 1000,
    temperatures: int = 200,
    leapfrog: int = 3,
    further: int = 20,
    rows_at_once: int = ROWS,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, LogZ]:
    """Estimates of log Z by name, each with standard error, effective sample size and k-hat.

    - "base": the mean of r over draws of the base. Heavy-tailed where the NCP has mass that the
      base hardly reaches: then it is too low, and its k-hat says so.
    - "ais": annealed importance sampling, chains going from the base to the NCP.
    - "bridge": between the draws of the base and `further` more moves of the annealed chains, which
      are draws of the NCP under their weights; the error is between whole chains.

    "bridge" shares its draws with the other two, so that the three are not independent.

    Args:
        vae: The VAE on the prior's base (`prior.under(vae)`), in evaluation mode.
        prior: A `NoiseContrastivePrior`.
        methods: Which of "base", "ais" and "bridge".
        draws: Draws of the base, for "base" and "bridge".
        chains: Independent annealed chains.
        temperatures: Steps from the base to the NCP.
        leapfrog: Evaluations of the gradient per step.
        further: Moves of each chain at the NCP, for "bridge".
        rows_at_once: Draws held at a time, and chains.
        seed: Seed of all draws.
        on_step: Told how many evaluations of r are done and out of how many, about; for a progress
            bar.

    Raises:
        ValueError: an unknown method, or a count that is too small.

    Reference: section 5.1 of Aneja et al. (NeurIPS 2021) has the first; see `annealing`, `bridge`.
    """
    unknown = set(methods) - set(METHODS)
    if unknown or not methods:
        raise ValueError(f"methods must be of {', '.join(METHODS)}, got {', '.join(methods)!r}")
    if min(draws, chains) < 2 or min(temperatures, leapfrog, further) < 1:
        raise ValueError(
            "draws and chains must be at least 2; temperatures, leapfrog and further at least 1; "
            f"got {draws=}, {chains=}, {temperatures=}, {leapfrog=}, {further=}"
        )
    at_first = draws if {"base", "bridge"} & set(methods) else 0
    moves, gradient = temperatures + further, 3 * leapfrog  # a gradient costs two evaluations more
    total = at_first + (chains * moves * gradient if {"ais", "bridge"} & set(methods) else 0)

    def tell(done: int) -> None:
        if on_step is not None:
            on_step(done, total)

    found = {}
    if at_first:
        generator = stream(seed, "nll log z", device=device_of(vae))
        at_base = base_log_ratios(
            vae, prior, draws, generator=generator, rows_at_once=rows_at_once, on_draws=tell
        )
        found["base"] = log_z(at_base)
    if total > at_first:
        log_weights, along = _annealed(
            vae,
            prior,
            chains,
            rows_at_once,
            temperatures=temperatures,
            leapfrog=leapfrog,
            further=further,
            seed=seed,
            on_move=lambda chain_moves: tell(at_first + gradient * chain_moves),
        )
        found["ais"] = log_z(log_weights)
        if "bridge" in methods:
            found["bridge"] = bridge_log_z(at_base, along, log_weights)
    return {method: found[method] for method in methods}


def _annealed(
    vae: Any,
    prior: Any,
    chains: int,
    together: int,
    *,
    temperatures: int,
    leapfrog: int,
    further: int,
    seed: int,
    on_move: Callable[[int], None],
) -> tuple[Tensor, Tensor]:
    """Log-weights (chains,) and log r along their further moves (chains, further)."""
    target = flat_target(vae, prior)
    densities = (target.log_base, target.log_ratio)
    pilots, generator = (
        stream(seed, purpose, device=device_of(vae))
        for purpose in ("annealing pilots", "annealing")
    )
    first_draws = target.sample(min(PILOTS, together), pilots)
    schedule = tuned_schedule(
        *densities, first_draws, temperatures, leapfrog=leapfrog, generator=pilots
    )
    parts, moves = [], temperatures + further
    for first in range(0, chains, together):
        num = min(together, chains - first)
        found = anneal(
            *densities,
            target.sample(num, generator),
            schedule,
            leapfrog=leapfrog,
            further=further,
            generator=generator,
            on_move=lambda move: on_move(first * moves + num * move),  # noqa: B023
        )
        parts.append(found)
    return (
        torch.cat([part.log_weights for part in parts]),
        torch.cat([part.along for part in parts]),
    )
