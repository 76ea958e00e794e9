"""Networks for log r(z) = log q(z) / p(z) over latents of size d: the logit of a classifier.

Several members are trained side by side as one batched matrix product and their logits are
averaged: on small data single classifiers over-fit and a sampler finds their mistakes.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}


class RatioNetwork(nn.Module):
    """E members that map z to a logit; log r is their calibrated mean: temperature * mean + shift.

    Subclasses define `logits`. Inputs are centred and scaled by buffers that `standardize` sets.
    """

    center: Tensor
    inverse_spread: Tensor
    temperature: Tensor
    shift: Tensor

    def __init__(self, latent_size: int, members: int) -> None:
        super().__init__()
        if latent_size < 1 or members < 1:
            raise ValueError(
                f"latent_size and members must be at least 1, got {latent_size=}, {members=}"
            )
        self.latent_size, self.members = latent_size, members
        self.register_buffer("center", torch.zeros(latent_size))
        self.register_buffer("inverse_spread", torch.ones(latent_size))
        self.register_buffer("temperature", torch.ones(()))
        self.register_buffer("shift", torch.zeros(()))

    def logits(self, x: Tensor) -> Tensor:
        """Standardised x (E, n, d) to each member's logits (E, n)."""
        raise NotImplementedError

    def member_logits(self, z: Tensor) -> Tensor:
        """Uncalibrated logits (E, n) at z (n, d), or at z (E, n, d) with rows for each member."""
        x = (z - self.center) * self.inverse_spread
        return self.logits(x if z.ndim == 3 else x.expand(self.members, -1, -1))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r(z) in nats for z (n, d), shape (n,)."""
        return torch.addcmul(self.shift, self.member_logits(z).mean(0), self.temperature)

    @torch.no_grad()
    def standardize(self, z: Tensor) -> None:
        """Centre and scale inputs by the mean and spread of z (n, d)."""
        self.center.copy_(z.mean(0))
        self.inverse_spread.copy_(1 / z.std(0).clamp_min(1e-6))


class MLPRatio(RatioNetwork):
    """A plain multi-layer perceptron; the published one is 100-100 with tanh (LARS, SNIS).

    Args:
        latent_size: d.
        hidden: Widths of the hidden layers.
        activation: "tanh", "relu" or "silu".
        members: Networks averaged.
    """

    def __init__(
        self,
        latent_size: int,
        *,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        members: int = 1,
    ) -> None:
        super().__init__(latent_size, members)
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.config: dict[str, Any] = {
            "network": "mlp",
            "latent_size": latent_size,
            "hidden": list(hidden),
            "activation": activation,
            "members": members,
        }
        self.activation: Any = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(
            EnsembleLinear(members, before, after)
            for before, after in itertools.pairwise([latent_size, *hidden, 1])
        )

    def logits(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x).squeeze(-1)


class ResidualRatio(RatioNetwork):
    """Linear, residual blocks of LayerNorm-Linear-SiLU-Linear, LayerNorm, SiLU, linear.

    The layer norms have no gain and bias of their own: the linear layer behind one contains them.

    Args:
        latent_size: d.
        width: Width of the residual stream.
        blocks: Number of residual blocks.
        dropout: Share of hidden units dropped within each block in training.
        members: Networks averaged.
    """

    def __init__(
        self,
        latent_size: int,
        *,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.1,
        members: int = 8,
    ) -> None:
        super().__init__(latent_size, members)
        if width < 1 or blocks < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"width and blocks must be at least 1 and dropout in [0, 1), "
                f"got {width=}, {blocks=}, {dropout=}"
            )
        self.config: dict[str, Any] = {
            "network": "residual",
            "latent_size": latent_size,
            "width": width,
            "blocks": blocks,
            "dropout": dropout,
            "members": members,
        }
        self.width, self.dropout = width, dropout
        self.stem = EnsembleLinear(members, latent_size, width)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList([EnsembleLinear(members, width, width) for _ in range(2)])
            for _ in range(blocks)
        )
        self.head = EnsembleLinear(members, width, 1)

    def logits(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for enter, leave in self.blocks:
            hidden = F.silu(enter(F.layer_norm(x, (self.width,))))
            x = x + leave(F.dropout(hidden, self.dropout, self.training))
        return self.head(F.silu(F.layer_norm(x, (self.width,)))).squeeze(-1)


class EnsembleLinear(nn.Module):
    """E linear layers side by side: (E, n, before) to (E, n, after) in one batched product."""

    def __init__(self, members: int, before: int, after: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(before)
        self.weight = nn.Parameter(torch.empty(members, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, after))

    def forward(self, x: Tensor) -> Tensor:
        if len(self.weight) == 1:  # the plain product is faster than a batch of one
            return torch.addmm(self.bias[0], x[0], self.weight[0])[None]
        return torch.baddbmm(self.bias, x, self.weight)


NETWORKS: dict[str, type[RatioNetwork]] = {"mlp": MLPRatio, "residual": ResidualRatio}
