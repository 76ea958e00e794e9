"""What resampled and energy-based priors share: a normal base, and a network that tilts it."""

import copy
import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from ncprior.normal import LOG_2_PI
from ncprior.numerics import LogZ, log_z
from ncprior.priors.latent import LatentPrior

ACTIVATIONS: dict[str, Any] = {
    "tanh": nn.Tanh,
    "silu": nn.SiLU,
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
}
NUMBERS_AT_ONCE = 1 << 22
"""Numbers of latents that a sampler holds at a time."""


class TiltedNormal(LatentPrior):
    """A normal base p(z) = N(loc, spread^2), N(0, I) at first, and a perceptron over its z.

    Args:
        latent_size: d.
        hidden: Widths of the perceptron's hidden layers.
        activation: "tanh", "silu" or "leaky_relu" (0.2).
        temperature: Factor of the base's standard deviation; the network stays as it is.
    """

    def __init__(
        self,
        latent_size: int,
        *,
        hidden: Sequence[int],
        activation: str,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(latent_size)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        if not hidden or min(hidden) < 1 or not temperature > 0:
            raise ValueError(
                "hidden must name widths of at least 1 and temperature be positive, "
                f"got {list(hidden)} and {temperature}"
            )
        self.hidden, self.activation, self.temperature = tuple(hidden), activation, temperature
        layers: list[nn.Module] = []
        for before, after in zip((latent_size, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        self.network = nn.Sequential(*layers, nn.Linear(hidden[-1], 1))

    @property
    def config(self) -> dict[str, Any]:
        return {
            "latent_size": self.latent_size,
            "hidden": list(self.hidden),
            "activation": self.activation,
            "temperature": self.temperature,
        }

    def score(self, z: Tensor) -> Tensor:
        """The network's output at z (..., d), (...)."""
        return self.network(self.inner(z)).squeeze(-1)

    def log_tilt(self, z: Tensor) -> Tensor:
        """Log of the density's ratio to the base at z (..., d) in nats, up to a constant, (...)."""
        return self.score(z)

    def base_log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density of the base in nats at z (..., d), (...)."""
        standard = self.inner(value) / self.temperature
        constant = self.log_det() - self.latent_size * math.log(self.temperature)
        return constant - 0.5 * (standard.square() + LOG_2_PI).sum(-1)

    def base_sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws of the base, (*sample_shape, d)."""
        options: Any = {"device": self.loc.device, "dtype": self.loc.dtype}
        noise = torch.randn((*sample_shape, self.latent_size), generator=generator, **options)
        return self.outer(self.temperature * noise)

    @torch.no_grad()
    def estimate_log_z(self, num: int = 1 << 18, *, generator: Generator) -> LogZ:
        """log E[exp(log_tilt)] under the base from `num` draws, with its standard error.

        `unnormalized_log_prob` less this is a normalised log-density, up to that error.
        """
        parts = [
            self.log_tilt(self.base_sample((count,), generator=generator))
            for count in chunks(num, max(1, NUMBERS_AT_ONCE // self.latent_size))
        ]
        return log_z(torch.cat(parts))

    def tempered(self, temperature: float) -> Self:
        """The same tilt of a base whose standard deviation is times `temperature`."""
        if temperature == 1:
            return self
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        other = copy.copy(self)
        other._buffers = dict(self._buffers)
        other.temperature = self.temperature * temperature
        return other


def chunks(num: int, size: int) -> list[int]:
    """Counts that add up to `num`, none above `size`."""
    return [min(size, num - first) for first in range(0, num, size)]
