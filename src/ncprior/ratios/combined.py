"""The log-ratio of a weighted mean of priors to a base prior.

Priors that were fitted in different ways make different mistakes. Their arithmetic mean, a mixture,
has the variety of all. Where they disagree the geometric mean is low, so that it is right more
often than each of them (a product of experts, Hinton 2002, of experts that were fitted one by one).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

MEANS = ("arithmetic", "geometric")


class CombinedRatio(nn.Module):
    """log r for priors r_i b_i over a base b, from x_i = log r_i + log b_i - log b - c_i.

    It is log sum_i w_i exp(x_i) for the arithmetic mean, of which r_i b_i exp(-c_i) should be
    normalised, and sum_i w_i x_i for the geometric one. The weights add up to 1; in the geometric
    mean one of the priors, the VAE's own, may have a negative one.

    The base is that of the prior that the ratio is part of and is not saved with it: `stand_on`
    says which it is.

    Args:
        ratios: log r_i, modules of latents (n, d); a `UnitRatio` for a prior that is a density.
        bases: The densities b_i other than b.
        places: For each ratio the number of its density in `bases`, from 1; 0 for b itself.
        latent_size: d.
        base: b, if it is at hand.
        mean: "arithmetic" or "geometric".

    Raises:
        ValueError: another mean, or places that are not of `bases` and `ratios`.
    """

    context_shape = None
    weights: Tensor  # (I,)
    offsets: Tensor  # (I,), c

    def __init__(
        self,
        ratios: Sequence[nn.Module],
        bases: Sequence[nn.Module],
        places: Sequence[int],
        latent_size: int,
        base: Any = None,
        mean: str = "arithmetic",
    ) -> None:
        super().__init__()
        if mean not in MEANS:
            raise ValueError(f"mean must be one of {', '.join(MEANS)}, got {mean!r}")
        if len(ratios) != len(places) or not set(places) <= set(range(len(bases) + 1)):
            raise ValueError(
                f"places must name one of {len(bases) + 1} densities for each of {len(ratios)} "
                f"ratios, got {list(places)}"
            )
        self.ratios, self.bases = nn.ModuleList(ratios), nn.ModuleList(bases)
        self.places, self.latent_shape, self.mean = tuple(places), (latent_size,), mean
        self.register_buffer("weights", torch.full((len(ratios),), 1 / len(ratios)))
        self.register_buffer("offsets", torch.zeros(len(ratios)))
        self.stand_on(base)

    def stand_on(self, base: Any) -> None:
        """Say which density b is; it is not changed."""
        self._base = (base,)  # a tuple, so that its weights are not taken for the ratio's
        for ratio, place in zip(self.ratios, self.places, strict=True):
            if isinstance(ratio, CombinedRatio):
                ratio.stand_on((base, *self.bases)[place])

    @property
    def chunk(self) -> int:
        """Proposals to weigh at a time."""
        return min(int(getattr(ratio, "chunk", 4096)) for ratio in self.ratios)

    def each(self, z: Tensor) -> Tensor:
        """log r_i + log b_i - log b in nats at z (n, d), (n, I)."""
        (base,) = self._base
        if base is None:
            raise ValueError("this ratio needs the density that it stands on; call stand_on first")
        over = [torch.zeros_like(z[:, 0])]
        if self.bases:
            below = base.log_prob(z)
            over += [log_density(other, z) - below for other in self.bases]
        parts = zip(self.ratios, self.places, strict=True)
        return torch.stack([ratio(z) + over[place] for ratio, place in parts], -1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r in nats at z (n, d), (n,)."""
        return self.mean_of(self.each(z))

    def mean_of(self, each: Tensor) -> Tensor:
        """log r (n,) from what `each` gave, (n, I)."""
        x, weights = each - self.offsets.to(each), self.weights.to(each)
        if self.mean == "geometric":
            return x @ weights
        return (x + weights.log()).logsumexp(-1)


def log_density(prior: Any, z: Tensor) -> Tensor:
    """log p(z) in nats at z (n, d), (n,), up to a constant where p is not normalised."""
    found: Tensor = (prior.log_prob if prior.normalized else prior.unnormalized_log_prob)(z)
    return found
