"""Pairs to tell apart: draws of q(z_k | z_<k) and of p(z_k | z_<k), given the same z_<k."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.walk import Evidence, Group, walk

View = Callable[[Tensor], Tensor]
"""What a network is shown of latents (n, *event), (n, ...)."""


class Pairs(NamedTuple):
    """Draws of one group to tell apart, in the coordinate of its ratio (`Group.standardize`)."""

    posterior: Tensor  # (n, *event), or what a view makes of it
    prior: Tensor  # the same
    context: Tensor | None  # (n, ...)


@torch.no_grad()
def draw_pairs(
    vae: Any,
    evidence: Evidence,
    num: int,
    generator: Generator,
    groups: Sequence[int] | None = None,
    view: View | None = None,
) -> list[Pairs]:
    """One walk along the posterior that also draws each group from its prior (Eq. 3 and 4).

    Returns those of `groups`, all by default. The draws of a group do not depend on which others
    are asked for.
    """
    wanted = range(vae.num_groups) if groups is None else groups
    pairs: dict[int, Pairs] = {}
    seen = view or (lambda z: z)

    def choose(k: int, group: Group) -> Tensor:
        assert group.posterior is not None
        z = group.posterior.sample(generator=generator)
        other = group.prior.sample(generator=generator)
        if k in wanted:
            posterior, prior = (seen(group.standardize(x)) for x in (z, other))
            pairs[k] = Pairs(posterior, prior, group.context)
        return z

    walk(vae, choose, num, evidence, groups=max(wanted) + 1)
    return [pairs[k] for k in wanted]
