"""Pairs to tell apart: draws of q(z_k | z_<k) and of p(z_k | z_<k), and their log-ratios."""

from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.walk import Evidence, Group, walk


class Pairs(NamedTuple):
    """Draws of one group to tell apart, given the same groups before it."""

    posterior: Tensor  # (n, *event)
    prior: Tensor  # (n, *event)
    context: Tensor | None


@torch.no_grad()
def draw_pairs(vae: Any, evidence: Evidence, num: int, generator: Generator) -> list[Pairs]:
    """One walk along the posterior that also draws each group from its prior (Eq. 3 and 4)."""
    pairs: list[Pairs] = []

    def choose(_: int, group: Group) -> Tensor:
        assert group.posterior is not None
        z = group.posterior.sample(generator=generator)
        pairs.append(Pairs(z, group.prior.sample(generator=generator), group.context))
        return z

    walk(vae, choose, num, evidence)
    return pairs


@torch.no_grad()
def log_ratios(ratio: Any, pairs: Pairs, chunk: int = 4096) -> tuple[Tensor, Tensor]:
    """log r at the posterior and at the prior draws of a group, each (n,)."""
    found = []
    for z in (pairs.posterior, pairs.prior):
        pieces = z.split(chunk)
        contexts = [None] * len(pieces) if pairs.context is None else pairs.context.split(chunk)
        found.append(torch.cat([ratio(*piece) for piece in zip(pieces, contexts, strict=True)]))
    return found[0], found[1]
