"""The importance-weighted bound on log p(x), for a base prior and a log-ratio on top of it."""

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.numerics import log_mean_exp
from ncprior.walk import Group, from_prior, walk


class Bounds(NamedTuple):
    """Lower bounds on log p(x) in nats, (n,), from the same draws."""

    base: Tensor
    unnormalized_ncp: Tensor | None  # subtract log Z to get the bound of the NCP


@torch.no_grad()
def importance_weighted_bounds(
    vae: Any,
    images: Tensor,
    samples: int,
    *,
    prior: Any | None = None,
    generator: Generator,
    rows_at_once: int = 10_000,
) -> Bounds:
    """log mean_s p(x|z_s) p(z_s) [r(z_s)] / q(z_s|x) over draws z_s of the posterior.

    Args:
        vae: Any VAE that offers the walk, on the device of `images`.
        images: (n, c, h, w) in [0, 1], binarised where the likelihood wants it.
        samples: Importance samples per image; the bound tightens with them.
        prior: A `NoiseContrastivePrior`, whose log r enters unnormalised.
        generator: Source of the draws.
        rows_at_once: Images times samples held at a time.

    Reference: Burda et al. (2016); with r, section 5.1 of Aneja et al. (NeurIPS 2021).
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    evidence = vae.encode(images)
    base, ncp = [], []
    together = max(1, rows_at_once // len(images))
    for first in range(0, samples, together):
        copies = min(together, samples - first)
        repeated = tuple(part.repeat(copies, *[1] * (part.ndim - 1)) for part in evidence)
        log_w, log_r = _log_weights(vae, images, repeated, copies, prior, generator)
        base.append(log_w)
        ncp.append(log_w + log_r)
    of_base = log_mean_exp(torch.cat(base), 0)
    return Bounds(of_base, None if prior is None else log_mean_exp(torch.cat(ncp), 0))


def _log_weights(
    vae: Any, images: Tensor, evidence: Any, copies: int, prior: Any | None, generator: Generator
) -> tuple[Tensor, Tensor | float]:
    """log p(x|z) p(z) / q(z|x) and log r(z), each (copies, n)."""
    terms, ratios = [], []

    def choose(k: int, group: Group) -> Tensor:
        assert group.posterior is not None
        z, log_q = group.posterior.rsample_and_log_prob(generator=generator)
        terms.append(group.prior.log_prob(z) - log_q)
        if prior is not None:
            ratios.append(prior.log_ratio(k, z, group))
        return z

    walked = walk(vae, choose, copies * len(images), evidence)
    emission = vae.emit(walked.state)
    terms.append(emission.log_prob(images.repeat(copies, 1, 1, 1)))
    shape = (copies, len(images))
    log_r: Tensor | float = torch.stack(ratios).sum(0).view(shape) if ratios else 0.0
    return torch.stack(terms).sum(0).view(shape), log_r


@torch.no_grad()
def base_log_ratios(
    vae: Any, prior: Any, num: int, *, generator: Generator, rows_at_once: int = 8192
) -> Tensor:
    """log r = sum_k log r_k in nats at `num` draws of the base prior, (num,); for the global log Z.

    Args:
        vae: The VAE on the prior's base (`prior.under(vae)`), in evaluation mode.
        prior: A `NoiseContrastivePrior`.
        num: Number of draws.
        generator: Source of the draws.
        rows_at_once: Draws held at a time.

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
    return torch.cat(pieces)
