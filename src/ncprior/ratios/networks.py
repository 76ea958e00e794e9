"""Networks for log r(z) = log q(z) / p(z) over latents of size d: the logit of a classifier.

Several members are trained side by side as one batched matrix product and their logits are
averaged: on small data single classifiers over-fit and a sampler finds their mistakes.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.numerics import random_bytes
from ncprior.ratios.scratch import scratch

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}
IN_PLACE: dict[str, Activation] = {
    "tanh": torch.tanh_,
    "relu": torch.relu_,
    "silu": partial(F.silu, inplace=True),
}
ACTIVATION_NUMBERS = 1 << 19
"""Numbers of a layer's output at which sampling is fastest: they stay in a core's cache."""


class RatioNetwork(nn.Module, ABC):
    """E members that map z to a logit; log r is their calibrated mean: temperature * mean + shift.

    Subclasses define `logits`. Inputs are centred and scaled by buffers that `standardize` sets.
    """

    center: Tensor
    inverse_spread: Tensor
    temperature: Tensor
    shift: Tensor
    widest: int  # width of the largest layer

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

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Standardised x (E, n, d) to each member's logits (E, n)."""

    def member_logits(self, z: Tensor) -> Tensor:
        """Uncalibrated logits (E, n) at z (n, d), or at z (E, n, d) with rows for each member."""
        x = torch.addcmul(-self.center * self.inverse_spread, z, self.inverse_spread)
        return self.logits(x if z.ndim == 3 else x.expand(self.members, -1, -1))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r(z) in nats for z (n, d), shape (n,).

        Raises:
            ValueError: a context; these networks are for VAEs with one group of latents.
        """
        if context is not None:
            raise ValueError(f"{type(self).__name__} takes no context; it suits one latent group")
        logits = self.member_logits(z)
        mean = logits[0] if self.members == 1 else logits.mean(0)
        return torch.addcmul(self.shift, mean, self.temperature)

    @property
    def chunk(self) -> int:
        """Proposals to weigh at a time."""
        return max(256, ACTIVATION_NUMBERS // (self.members * self.widest))

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
        self.activation = activation
        self.widest = max(hidden)
        self.layers = nn.ModuleList(
            EnsembleLinear(members, before, after)
            for before, after in itertools.pairwise([latent_size, *hidden, 1])
        )

    def logits(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        activation = (ACTIVATIONS if training else IN_PLACE)[self.activation]
        for i, layer in enumerate(self.layers[:-1]):
            x = activation(layer(x, None if training else i % 2))
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
        if width < 1 or blocks < 1 or not 0 <= dropout <= 0.9:
            raise ValueError(
                f"width and blocks must be at least 1 and dropout in [0, 0.9], "
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
        self.width = self.widest = width
        self.dropout = dropout
        self.stem = EnsembleLinear(members, latent_size, width)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList([EnsembleLinear(members, width, width) for _ in range(2)])
            for _ in range(blocks)
        )
        self.head = EnsembleLinear(members, width, 1)

    def logits(self, x: Tensor) -> Tensor:
        training = torch.is_grad_enabled()
        silu = (ACTIVATIONS if training else IN_PLACE)["silu"]
        keep = [None] * 3 if training else [0, 1, 2]
        x = self.stem(x, keep[0])
        for enter, leave in self.blocks:
            hidden = silu(enter(F.layer_norm(x, (self.width,)), keep[1]))
            change = leave(dropout(hidden, self.dropout) if self.training else hidden, keep[2])
            x = x + change if training else x.add_(change)
        return self.head(silu(F.layer_norm(x, (self.width,)))).squeeze(-1)


def dropout(x: Tensor, share: float) -> Tensor:
    """x with about `share` of its numbers zeroed and the others scaled up so that the mean stays.

    On the CPU the share is rounded to 1/256, so that one random byte decides about each number:
    torch's own dropout would take a third of a training step.
    """
    if x.device.type != "cpu":
        return F.dropout(x, share)
    zeroed = round(256 * share)
    kept = random_bytes(x.numel()).ge(zeroed).view(torch.uint8).to(x.dtype)
    return x * kept.mul_(256 / (256 - zeroed)).view(x.shape)


class EnsembleLinear(nn.Module):
    """E linear layers side by side: (E, n, before) to (E, n, after) in one batched product."""

    def __init__(self, members: int, before: int, after: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(before)
        self.weight = nn.Parameter(torch.empty(members, before, after).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(members, 1, after))

    def forward(self, x: Tensor, slot: int | None = None) -> Tensor:
        """The product, in memory of its own or, without gradient, in scratch block `slot`."""
        members, _, after = self.weight.shape
        out = None if slot is None else scratch(slot, x, (members, x.shape[1], after))
        if members == 1:  # the plain product is faster than a batch of one
            into = None if out is None else out[0]
            return torch.addmm(self.bias[0], x[0], self.weight[0], out=into)[None]
        return torch.baddbmm(self.bias, x, self.weight, out=out)


NETWORKS: dict[str, type[RatioNetwork]] = {"mlp": MLPRatio, "residual": ResidualRatio}
