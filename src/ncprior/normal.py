"""Normal densities with diagonal covariance that draw from explicit generators.

`torch.distributions.Normal` takes no generator; apart from that this speaks its language.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

LOG_2_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Normal:
    """N(loc, diag(scale^2)), the last `event_dim` axes being one event."""

    loc: Tensor  # (*batch, *event)
    scale: Tensor  # (*batch, *event), positive
    event_dim: int = 1

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.loc.shape[: self.loc.ndim - self.event_dim])

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.loc.shape[self.loc.ndim - self.event_dim :])

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, *batch, *event), differentiable in loc and scale."""
        return torch.addcmul(self.loc, self._noise(sample_shape, generator), self.scale)

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The draws of `rsample` and their log-densities in nats, (*sample_shape, *batch)."""
        noise = self._noise(sample_shape, generator)
        return torch.addcmul(self.loc, noise, self.scale), self._log_prob_of_noise(noise)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, *batch, *event) without gradient."""
        return self.rsample(sample_shape, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats, the shape of `value` less the event."""
        return self._log_prob_of_noise((value - self.loc) / self.scale)

    def kl(self, other: "Normal") -> Tensor:
        """KL(self || other) in nats, of the batch shape, in closed form."""
        ratio = self.scale / other.scale
        shift = (self.loc - other.loc) / other.scale
        return self._over_event(0.5 * (ratio.square() + shift.square() - 1) - ratio.log())

    def tempered(self, temperature: float) -> "Normal":
        """The same mean, the standard deviation times `temperature`."""
        if temperature == 1:
            return self
        return Normal(self.loc, self.scale * temperature, self.event_dim)

    def row(self, index: int) -> "Normal":
        """The density of one row of the batch."""
        return Normal(self.loc[index], self.scale[index], self.event_dim)

    def _noise(self, sample_shape: Sequence[int], generator: Generator | None) -> Tensor:
        shape = (*sample_shape, *self.loc.shape)
        return torch.randn(shape, generator=generator, device=self.loc.device, dtype=self.loc.dtype)

    def _log_prob_of_noise(self, noise: Tensor) -> Tensor:
        scale = self.scale
        if scale.ndim > self.event_dim and scale.stride(0) == 0:
            scale = scale[:1]  # all rows have the same: logarithms are slow
        constant = 0.5 * LOG_2_PI * math.prod(self.event_shape)
        return -0.5 * self._over_event(noise.square()) - self._over_event(scale.log()) - constant

    def _over_event(self, values: Tensor) -> Tensor:
        return values.flatten(values.ndim - self.event_dim).sum(-1)


def bounded_normal(loc: Tensor, log_scale: Tensor, event_dim: int = 3) -> Normal:
    """N(5 tanh(loc / 5), (exp(5 tanh(log_scale / 5)) + 0.01)^2), at least in single precision.

    So no output of a network gives a mean or a log-scale beyond +-5, nor a scale below 0.016.

    Reference: Vahdat and Kautz (NeurIPS 2020); the bounds are those of their checkpoints.
    """
    dtype = torch.promote_types(loc.dtype, torch.float32)
    scale = _bounded(log_scale.to(dtype)).exp() + 0.01
    return Normal(_bounded(loc.to(dtype)), scale, event_dim)


def _bounded(x: Tensor) -> Tensor:
    return 5 * (x / 5).tanh()


class StandardNormal(nn.Module):
    """The usual base prior N(0, I) over latents of size d, movable between devices."""

    normalized = True
    loc: Tensor
    scale: Tensor

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        self.latent_size = latent_size
        self.register_buffer("loc", torch.zeros(latent_size), persistent=False)
        self.register_buffer("scale", torch.ones(latent_size), persistent=False)

    @property
    def config(self) -> dict[str, int]:
        return {"latent_size": self.latent_size}

    @classmethod
    def fit(cls, codes: Any, *, seed: int = 0, report: Any = None) -> "StandardNormal":
        """N(0, I) of the size of the codes; there is nothing to fit."""
        return cls(codes.loc.shape[1]).to(codes.loc.device)

    def rows(self, num: int) -> Normal:
        """The same density for each of `num` rows."""
        return Normal(self.loc.expand(num, -1), self.scale.expand(num, -1))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.latent_size,)

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        shape = (*sample_shape, self.latent_size)
        return torch.randn(shape, generator=generator, device=self.loc.device, dtype=self.loc.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...)."""
        return -0.5 * (value.square().sum(-1) + LOG_2_PI * self.latent_size)

    def tempered(self, temperature: float) -> Normal:
        """N(0, temperature^2 I)."""
        return Normal(self.loc, self.scale * temperature)
