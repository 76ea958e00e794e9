"""Lower bounds on log p(x) for several priors under one VAE, from the same posterior draws."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.metrics.importance import Weights, WeightSums
from ncprior.walk import Group, device_of, from_prior, walk

CACHED_NUMBERS = 1 << 20
"""Numbers of the decoder's output at which a CPU is fastest: few calls, all in its cache."""


class Bounds(NamedTuple):
    """Lower bounds on log p(x) in nats, (n,) in float64, all from the same draws."""

    base: Tensor
    unnormalized_ncp: Tensor | None  # subtract log Z to get the bound of the NCP
    snis: Tensor | None  # a bound whatever Z is
    others: dict[str, Tensor]
    weights: dict[str, Weights]  # of "base", "ncp", "snis" and the others


@torch.no_grad()
def importance_weighted_bounds(
    vae: Any,
    images: Tensor,
    samples: int,
    *,
    prior: Any | None = None,
    pool: Tensor | None = None,
    others: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    generator: Generator,
    rows_at_once: int | None = None,
) -> Bounds:
    """log mean_s p(x|z_s) p(z_s) / q(z_s|x) over draws z_s of the posterior, for each prior p.

    The base prior is the VAE's own. With r of an NCP it enters as r p, unnormalised. With a pool of
    K - 1 ratios r_j at draws of the base it also enters as the density that SNIS samples,

        p_K(z) = E[ p(z) r(z) / ((r(z) + r_1 + ... + r_{K-1}) / K) ].

    The quotient is an unbiased estimate of p_K(z), so the mean over s is one of p(x) under p_K, and
    its logarithm is a bound below log p(x) in expectation, whatever Z is. That takes an
    expectation over the pool, not independent pools: all draws and images may share one. It only
    correlates the bounds of images that do, which an error over images must take in.

    Args:
        vae: Any VAE that offers the walk, on the device of `images`.
        images: (n, c, h, w) in [0, 1], binarised where the likelihood wants it.
        samples: Importance samples S per image; the bounds tighten with them.
        prior: A `NoiseContrastivePrior` on the base of `vae` (see its `under`).
        pool: log r at fresh draws of the base, (K - 1,), as `base_log_ratios` gives; fresh for each
            call.
        others: Further priors of a flat VAE: functions from z (m, d) to log p(z) (m,) in nats,
            such as the `log_prob` of a density or an NCP's `unnormalized_log_prob`.
        generator: Source of the draws, which do not depend on the priors.
        rows_at_once: Images times samples held at a time; by default as many as are fast.

    Raises:
        ValueError: samples below 1, no images, others under several latent groups, a pool without
            a prior, or weights that are NaN or infinite.

    Reference: Burda et al. (ICLR 2016); with r, section 5.1 of Aneja et al. (NeurIPS 2021); SNIS:
    Lawson et al., Energy-inspired models (NeurIPS 2019), with their K proposals.
    """
    others = dict(others or {})
    _check(vae, images, samples, prior, pool, others)
    n = len(images)
    rows = rows_at_once or _rows_at_once(vae, images)
    together = max(1, min(samples, rows // n))
    names = ["base", *others]
    if prior is not None:
        names += ["ncp"] if pool is None else ["ncp", "snis"]
    sums = {name: WeightSums(samples) for name in names}
    of_pool = None if pool is None else pool.double().logsumexp(0)

    evidence = vae.encode(images)
    posterior = vae.group(vae.start(n), evidence).posterior if vae.num_groups == 1 else None
    copied = tuple(part.repeat(together, *[1] * (part.ndim - 1)) for part in evidence)
    for first in range(0, samples, together):
        copies = min(together, samples - first)
        repeated = tuple(part[: copies * n] for part in copied)
        parts = _log_weights(vae, images, repeated, posterior, copies, prior, others, generator)
        for name, log_w in parts.items():
            sums[name].add(log_w)
        if of_pool is not None and pool is not None:
            log_r = (parts["ncp"] - parts["base"]).double()
            mean_ratio = torch.logaddexp(log_r, of_pool) - math.log(len(pool) + 1)
            sums["snis"].add(parts["ncp"] - mean_ratio)
    found = {name: sums[name].summary() for name in names}
    bound = {name: weights.log_mean for name, weights in found.items()}
    return Bounds(
        bound["base"],
        bound.get("ncp"),
        bound.get("snis"),
        {name: bound[name] for name in others},
        found,
    )


def _check(
    vae: Any, images: Tensor, samples: int, prior: Any, pool: Tensor | None, others: dict[str, Any]
) -> None:
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if images.ndim != 4 or not len(images):
        raise ValueError(f"images must be (n, c, h, w), at least one, got {tuple(images.shape)}")
    if pool is not None and prior is None:
        raise ValueError("a pool of ratios needs the prior that they are of; pass prior")
    if pool is not None and (pool.ndim != 1 or not len(pool)):
        raise ValueError(f"pool must be (K - 1,) with K of at least 2, got {tuple(pool.shape)}")
    if others and vae.num_groups > 1:
        raise ValueError(
            f"others are priors of one latent group, this VAE has {vae.num_groups}; "
            "only base and NCP can be compared"
        )
    if taken := {"base", "ncp", "snis"} & set(others):
        raise ValueError(f"others must not be named {', '.join(sorted(taken))}")


def _rows_at_once(vae: Any, images: Tensor) -> int:
    numbers = CACHED_NUMBERS * (1 if device_of(vae).type == "cpu" else 64)
    return max(1, numbers // math.prod(images.shape[1:]))


def _log_weights(
    vae: Any,
    images: Tensor,
    evidence: Any,
    posterior: Any | None,
    copies: int,
    prior: Any | None,
    others: dict[str, Callable[[Tensor], Tensor]],
    generator: Generator,
) -> dict[str, Tensor]:
    """log p(x|z) p(z) / q(z|x) for each prior, (copies, n).

    With one latent group the posterior of the n images serves all copies.
    """
    log_p, log_q, log_r = [], [], []

    def choose(k: int, group: Group) -> Tensor:
        if posterior is not None:
            of_copies, at_z = posterior.rsample_and_log_prob((copies,), generator=generator)
            z, at_z = of_copies.flatten(0, 1), at_z.flatten()
        else:
            assert group.posterior is not None
            z, at_z = group.posterior.rsample_and_log_prob(generator=generator)
        log_q.append(at_z)
        log_p.append(group.prior.log_prob(z))
        if prior is not None:
            log_r.append(prior.log_ratio(k, z, group))
        return z

    walked = walk(vae, choose, copies * len(images), evidence)
    shape = (copies, len(images))
    of_images = _log_likelihood(vae.emit(walked.state), images, copies)
    rest = of_images - torch.stack(log_q).sum(0).view(shape)
    found = {"base": rest + torch.stack(log_p).sum(0).view(shape)}
    if log_r:
        found["ncp"] = found["base"] + torch.stack(log_r).sum(0).view(shape)
    for name, log_prob in others.items():
        found[name] = rest + log_prob(walked.latents[0]).view(shape)
    return found


def _log_likelihood(emission: Any, images: Tensor, copies: int) -> Tensor:
    """log p(x|z) of the images under each copy's row, (copies, n)."""
    of_copies = getattr(emission, "log_prob_of_copies", None)
    if of_copies is not None:
        return of_copies(images)
    return emission.log_prob(images.repeat(copies, 1, 1, 1)).view(copies, -1)


@torch.no_grad()
def base_log_ratios(
    vae: Any,
    prior: Any,
    num: int,
    *,
    generator: Generator,
    rows_at_once: int = 8192,
    on_draws: Callable[[int], None] | None = None,
) -> Tensor:
    """log r = sum_k log r_k in nats at `num` draws of the base prior, (num,); for the global log Z.

    Args:
        vae: The VAE on the prior's base (`prior.under(vae)`), in evaluation mode.
        prior: A `NoiseContrastivePrior`.
        num: Number of draws.
        generator: Source of the draws.
        rows_at_once: Draws held at a time.
        on_draws: Told the number of draws done, for a progress bar.

    Reference: section 4.4 of Aneja et al. (NeurIPS 2021): the density normalised as a whole.
    """
    from_base, pieces = from_prior(generator), []
    for first in range(0, num, rows_at_once):
        total = []

        def choose(k: int, group: Group) -> Tensor:
            z = from_base(k, group)
            total.append(prior.log_ratio(k, z, group))  # noqa: B023
            return z

        walk(vae, choose, min(rows_at_once, num - first))
        pieces.append(torch.stack(total).sum(0))
        if on_draws is not None:
            on_draws(min(first + rows_at_once, num))
    return torch.cat(pieces)
