"""A log-ratio with linear and quadratic terms on top: they set mean and covariance of p r."""

from typing import Any

import torch
from torch import Tensor, nn

from ncprior.ratios.network import RatioNetwork


class MatchedRatio(nn.Module):
    """log r(z) + a'w + w'Bw - c, w being z in coordinates in which q is white.

    Beyond the ball in which draws of q lie, w is taken at its edge: the terms are bounded, so that
    p r stays normalisable.

    Args:
        network: log r, of flat latents without a context.
    """

    centre: Tensor  # (d,), the mean of q
    whitening: Tensor  # (d, d): w = whitening (z - centre)
    radius: Tensor  # ()
    linear: Tensor  # (d,), a
    quadratic: Tensor  # (d, d), B, symmetric
    offset: Tensor  # (), c

    def __init__(self, network: RatioNetwork) -> None:
        super().__init__()
        if len(network.latent_shape) != 1 or network.context_shape is not None:
            raise ValueError(
                "network must be of flat latents without a context, got latents "
                f"{network.latent_shape} and context {network.context_shape}"
            )
        (d,) = network.latent_shape
        self.network = network
        for name, value in (
            ("centre", torch.zeros(d)),
            ("whitening", torch.eye(d)),
            ("radius", torch.ones(())),
            ("linear", torch.zeros(d)),
            ("quadratic", torch.zeros(d, d)),
            ("offset", torch.zeros(())),
        ):
            self.register_buffer(name, value.to(network.temperature))

    @property
    def config(self) -> dict[str, Any]:
        return {"network": "matched", "of": self.network.config}

    @property
    def chunk(self) -> int:
        """Proposals to weigh at a time."""
        return self.network.chunk

    def white(self, z: Tensor) -> Tensor:
        """w at z (n, d), (n, d)."""
        w = (z - self.centre) @ self.whitening.T
        return w * (self.radius / w.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1)

    def tilt(self, z: Tensor) -> Tensor:
        """a'w + w'Bw - c in nats at z (n, d), (n,)."""
        w = self.white(z)
        return (w * (self.linear + w @ self.quadratic)).sum(-1) - self.offset

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r in nats at z (n, d), (n,)."""
        found: Tensor = self.network(z, context) + self.tilt(z)
        return found
