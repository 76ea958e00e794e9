"""Ratio networks over flattened latents: an MLP and a residual network.

Members, and groups in training, are stacked: one batched matrix product serves all of them. Where a
CPU weighs many rows, one member after the other is as fast, and faster where `affine` is.
"""

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.numerics import random_bytes
from ncprior.products import affine
from ncprior.ratios.network import RatioNetwork, shapes
from ncprior.ratios.scratch import scratch

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": F.relu, "silu": F.silu}
IN_PLACE: dict[str, Activation] = {
    "tanh": torch.tanh_,
    "relu": torch.relu_,
    "silu": partial(F.silu, inplace=True),
}
EVERY = slice(None)


class FlatRatio(RatioNetwork):
    """What networks on flattened latents share; they define `trunk` behind the first layer."""

    center: Tensor
    inverse_spread: Tensor
    context_center: Tensor
    context_inverse_spread: Tensor

    def __init__(
        self,
        latent_shape: Sequence[int] | int,
        context_shape: Sequence[int] | None,
        members: int,
        groups: int,
        width: int,
    ) -> None:
        super().__init__(latent_shape, context_shape, members, groups)
        self.latent_size, self.width = math.prod(self.latent_shape), width
        stack = members * groups
        self.register_buffer("center", torch.zeros(groups, self.latent_size))
        self.register_buffer("inverse_spread", torch.ones(groups, self.latent_size))
        self.stem = EnsembleLinear(stack, self.latent_size, width)
        self.context_stem: Any = None
        if self.context_shape is not None:
            size = math.prod(self.context_shape)
            self.register_buffer("context_center", torch.zeros(groups, size))
            self.register_buffer("context_inverse_spread", torch.ones(groups, size))
            self.context_stem = EnsembleLinear(stack, size, width)

    @abstractmethod
    def trunk(self, x: Tensor, some: slice = EVERY) -> Tensor:
        """Behind the first layer (G E, n, width), which may be overwritten, to logits (G E, n).

        Or (s, n, width) to (s, n) for `some` of the networks.
        """

    def member_logits(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.stem(self._standardized(z, self.latent_shape, self.center, self.inverse_spread))
        if context is not None:
            own = self._context_part(context)
            x = (x.unflatten(1, (-1, own.shape[1])) + own[:, None]).flatten(1, 2)
        return self.trunk(x)

    def embed(self, context: Tensor | None) -> Tensor | None:
        self.check_context(context)
        return None if context is None else self._context_part(context).transpose(0, 1)

    def weigh_members(self, z: Tensor, embedded: Tensor | None) -> Tensor:
        j, m = z.shape[:2]
        flat = z.reshape(j * m, self.latent_size)
        x = torch.addcmul(-self.center[0] * self.inverse_spread[0], flat, self.inverse_spread[0])
        stacked = torch.is_grad_enabled() or not x.is_cpu
        every = [EVERY] if stacked else [slice(e, e + 1) for e in range(self.members)]
        return torch.cat([self._weigh(x, some, embedded, (j, m)) for some in every])

    def _weigh(
        self, x: Tensor, some: slice, embedded: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        """Logits (s, j, m) of some members at standardised rows x (j m, d)."""
        x = self.stem(x.expand(len(self.stem.bias[some]), -1, -1), some, slot(0))
        if embedded is not None:
            parts, own = x.unflatten(1, shape), embedded.transpose(0, 1)[some, :, None]
            x = (parts + own if torch.is_grad_enabled() else parts.add_(own)).flatten(1, 2)
        return self.trunk(x, some).unflatten(1, shape)

    @torch.no_grad()
    def standardize(self, z: Tensor, context: Tensor | None = None) -> None:
        flat = z.flatten(1)
        self.center.copy_(flat.mean(0))
        self.inverse_spread.copy_(1 / flat.std(0).clamp_min(1e-6))
        if context is not None:
            flat = context.flatten(1)
            self.context_center.copy_(flat.mean(0))
            self.context_inverse_spread.copy_(1 / flat.std(0).clamp_min(1e-3))

    @property
    def numbers_per_row(self) -> int:
        return max(self.width, 1)

    @property
    def chunk(self) -> int:
        of_one = super().chunk * (self.members if self.center.is_cpu else 1)
        return max(256, of_one)

    def _context_part(self, context: Tensor) -> Tensor:
        assert self.context_shape is not None
        return self.context_stem(
            self._standardized(
                context, self.context_shape, self.context_center, self.context_inverse_spread
            )
        )

    def _standardized(
        self, x: Tensor, shape: tuple[int, ...], center: Tensor, inverse_spread: Tensor
    ) -> Tensor:
        """x (n, *shape) or (G E, n, *shape), flattened, to (G E, n, size)."""
        flat, stack = x.flatten(-len(shape)), self.members * self.groups
        if flat.ndim == 2:
            flat = torch.addcmul(-center[0] * inverse_spread[0], flat, inverse_spread[0])
            return flat.expand(stack, -1, -1)
        if self.groups == 1:
            return torch.addcmul(-center[0] * inverse_spread[0], flat, inverse_spread[0])
        own = flat.unflatten(0, (self.groups, self.members))
        scale = inverse_spread[:, None, None]
        return torch.addcmul(-center[:, None, None] * scale, own, scale).flatten(0, 1)


class MLPRatio(FlatRatio):
    """A plain multi-layer perceptron; the published one is 100-100 with tanh (LARS, SNIS).

    Args:
        latent_shape: d, or the event shape, which is flattened.
        context_shape: Shape of the context; None without.
        hidden: Widths of the hidden layers.
        activation: "tanh", "relu" or "silu".
        members: Networks averaged.
        groups: Latent groups stacked for training.
    """

    def __init__(
        self,
        latent_shape: Sequence[int] | int,
        *,
        context_shape: Sequence[int] | None = None,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        members: int = 1,
        groups: int = 1,
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        super().__init__(latent_shape, context_shape, members, groups, hidden[0])
        self.config: dict[str, Any] = {
            "network": "mlp",
            "hidden": list(hidden),
            "activation": activation,
        } | shapes(self)
        self.activation = activation
        self.width = max(hidden)
        self.layers = nn.ModuleList(
            EnsembleLinear(members * groups, before, after)
            for before, after in itertools.pairwise([*hidden, 1])
        )

    def trunk(self, x: Tensor, some: slice = EVERY) -> Tensor:
        activation = (ACTIVATIONS if torch.is_grad_enabled() else IN_PLACE)[self.activation]
        for i, layer in enumerate(self.layers):
            last = i + 1 == len(self.layers)
            x = layer(activation(x), some, None if last else slot((i + 1) % 2))
        return x.squeeze(-1)


class ResidualRatio(FlatRatio):
    """Linear, residual blocks of LayerNorm-Linear-SiLU-Linear, LayerNorm, SiLU, linear.

    The layer norms have no gain and bias of their own: the linear layer behind one contains them.

    Args:
        latent_shape: d, or the event shape, which is flattened.
        context_shape: Shape of the context; None without.
        width: Width of the residual stream.
        blocks: Number of residual blocks.
        dropout: Share of hidden units dropped within each block in training.
        members: Networks averaged.
        groups: Latent groups stacked for training.
    """

    def __init__(
        self,
        latent_shape: Sequence[int] | int,
        *,
        context_shape: Sequence[int] | None = None,
        width: int = 64,
        blocks: int = 2,
        dropout: float = 0.1,
        members: int = 8,
        groups: int = 1,
    ) -> None:
        if width < 1 or blocks < 1 or not 0 <= dropout <= 0.9:
            raise ValueError(
                f"width and blocks must be at least 1 and dropout in [0, 0.9], "
                f"got {width=}, {blocks=}, {dropout=}"
            )
        super().__init__(latent_shape, context_shape, members, groups, width)
        self.config: dict[str, Any] = {
            "network": "residual",
            "width": width,
            "blocks": blocks,
            "dropout": dropout,
        } | shapes(self)
        self.dropout, stack = dropout, members * groups
        self.blocks: Any = nn.ModuleList(
            nn.ModuleList([EnsembleLinear(stack, width, width) for _ in range(2)])
            for _ in range(blocks)
        )
        self.head = EnsembleLinear(stack, width, 1)

    def trunk(self, x: Tensor, some: slice = EVERY) -> Tensor:
        training = torch.is_grad_enabled()
        silu = (ACTIVATIONS if training else IN_PLACE)["silu"]
        for enter, leave in self.blocks:
            hidden = silu(enter(F.layer_norm(x, (self.width,)), some, slot(1)))
            hidden = dropout(hidden, self.dropout) if self.training else hidden
            change = leave(hidden, some, slot(2))
            x = x + change if training else x.add_(change)
        return self.head(silu(F.layer_norm(x, (self.width,))), some).squeeze(-1)


def slot(number: int) -> int | None:
    """The scratch block of a layer's output; none where gradients need every output."""
    return None if torch.is_grad_enabled() else number


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

    def forward(self, x: Tensor, some: slice = EVERY, block: int | None = None) -> Tensor:
        """Products of some members, in memory of their own or, without gradient, in scratch."""
        weight, bias = self.weight[some], self.bias[some]
        members, _, after = weight.shape
        out = None if block is None else scratch(block, x, (members, x.shape[1], after))
        if members == 1:  # the plain product is faster than a batch of one
            into = None if out is None else out[0]
            return affine(x[0], weight[0], bias[0, 0], into)[None]
        return torch.baddbmm(bias, x, weight, out=out)
