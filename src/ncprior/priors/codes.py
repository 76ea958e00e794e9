"""What an encoder says of many images: the aggregate posterior that priors are fitted to."""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.numerics import stream


class Codes(NamedTuple):
    """What the encoder says of n images: q(z) is the average of N(loc_i, diag(scale_i^2))."""

    loc: Tensor  # (n, d)
    scale: Tensor  # (n, d); zeros for a deterministic autoencoder

    @property
    def latent_size(self) -> int:
        return self.loc.shape[1]

    def draw(self, num: int, *, generator: Generator) -> Tensor:
        """Draws of q(z), (num, d): images picked at random with replacement, fresh noise."""
        rows = torch.randint(len(self.loc), (num,), generator=generator, device=self.loc.device)
        return _draw(self.loc[rows], self.scale[rows], generator)

    def each(self, *, generator: Generator) -> Tensor:
        """One draw of each image's posterior, in the order of the images, (n, d)."""
        return _draw(self.loc, self.scale, generator)

    def split(self, heldout: float, *, seed: int) -> tuple["Codes", "Codes"]:
        """The codes of all other images, and those of a share `heldout` of them (at least one)."""
        if not 0 < heldout < 1:
            raise ValueError(f"heldout must be a share between 0 and 1, got {heldout}")
        num = len(self.loc)
        if num < 2:
            raise ValueError(f"codes must hold two images or more to be split, got {num}")
        order = torch.randperm(num, generator=stream(seed, "held-out codes")).to(self.loc.device)
        count = min(max(round(heldout * num), 1), num - 1)
        kept, left = order[count:], order[:count]
        return Codes(self.loc[kept], self.scale[kept]), Codes(self.loc[left], self.scale[left])

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of q(z) in each coordinate, (d,) each, exactly."""
        variance = self.loc.double().var(0, correction=0) + self.scale.double().square().mean(0)
        return self.loc.double().mean(0).to(self.loc), variance.sqrt().to(self.loc)

    def checked(self) -> "Codes":
        """Themselves, if priors can be fitted to them.

        Raises:
            ValueError: shapes that disagree, fewer than two images, NaN or infinity, or a scale
                below zero.
        """
        if self.loc.ndim != 2 or self.loc.shape != self.scale.shape or len(self.loc) < 2:
            raise ValueError(
                "codes must be two tensors (n, d) with n of at least 2, "
                f"got {tuple(self.loc.shape)} and {tuple(self.scale.shape)}"
            )
        if not (self.loc.isfinite().all() and self.scale.isfinite().all()):
            raise ValueError("codes must be finite; the encoder returned NaN or infinity")
        if (self.scale < 0).any():
            raise ValueError("codes must have scales of at least 0; pass standard deviations")
        return self


def _draw(loc: Tensor, scale: Tensor, generator: Generator) -> Tensor:
    noise = torch.randn(loc.shape, generator=generator, device=loc.device, dtype=loc.dtype)
    return torch.addcmul(loc, noise, scale)
