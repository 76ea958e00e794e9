"""A convolutional ratio network over latent maps (section 5.2 of the paper; NVAE's groups).

Members and groups are stacked along the channels and kept apart by grouped convolutions, so that
the classifiers of many small groups cost about as many operations as one.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.ratios.folded import Folded, fold
from ncprior.ratios.network import RatioNetwork, shapes


class ConvRatio(RatioNetwork):
    """Convolution, residual blocks at up to three widths with halving between, pool, linear.

    A block is x + SE(BN-Swish-Conv-BN-Swish-Conv). Each stage after the first begins with one that
    halves the sides and doubles the channels; maps that are too small for a halving end there.

    Args:
        latent_shape: (c, h, w) of z.
        context_shape: (c', h, w) of the context; None without.
        width: Channels of the first stage.
        blocks: Residual blocks of each stage, beside the one that halves.
        stages: Stages at most; 3 is the published network.
        members: Networks averaged.
        groups: Latent groups stacked for training.

    Reference: sections 4.4 and 5.2 of Aneja et al. (NeurIPS 2021). The paper leaves out how the
    context enters: here through a first convolution of its own.
    """

    def __init__(
        self,
        latent_shape: Sequence[int],
        *,
        context_shape: Sequence[int] | None = None,
        width: int = 32,
        blocks: int = 3,
        stages: int = 3,
        members: int = 1,
        groups: int = 1,
    ) -> None:
        if width < 1 or blocks < 0 or stages < 1:
            raise ValueError(
                f"width and stages must be at least 1 and blocks at least 0, "
                f"got {width=}, {blocks=}, {stages=}"
            )
        if isinstance(latent_shape, int) or len(latent_shape) != 3:
            raise ValueError(
                f"latent_shape must be (channels, height, width) for a ConvRatio, "
                f"got {latent_shape}; use the network 'residual' for flat latents"
            )
        if context_shape is not None and tuple(context_shape[1:]) != tuple(latent_shape[1:]):
            raise ValueError(
                f"context_shape {tuple(context_shape)} and latent_shape {tuple(latent_shape)} must "
                "have the same height and width; use the network 'residual' for other contexts"
            )
        super().__init__(latent_shape, context_shape, members, groups)
        self.config: dict[str, Any] = {
            "network": "conv",
            "width": width,
            "blocks": blocks,
            "stages": stages,
        } | shapes(self)
        self.width, stack = width, members * groups
        self.stem = _Conv(stack, self.latent_shape[0], width, 3)
        self.context_norm: Any = None
        if self.context_shape is not None:
            self.context_norm = nn.BatchNorm2d(stack * self.context_shape[0], affine=False)
            self.context_stem = _Conv(stack, self.context_shape[0], width, 3, bias=False)
        halvings = min(stages - 1, int(math.log2(min(self.latent_shape[1:]))))
        layers: list[nn.Module] = []
        for stage in range(halvings + 1):
            channels = width * 2**stage
            if stage:
                layers.append(_Block(stack, channels // 2, channels, stride=2))
            layers += [_Block(stack, channels, channels) for _ in range(blocks)]
        self.trunk = nn.Sequential(*layers)
        self.head = _Conv(stack, width * 2**halvings, 1, 1)
        self._kept: tuple[list[Any], list[Folded]] | None = None

    def member_logits(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.stem(self._channels(z))
        if context is not None:
            own = self._context_part(context)
            x = (x.unflatten(0, (-1, len(own))) + own).flatten(0, 1)
        return self._logits(x)

    def embed(self, context: Tensor | None) -> Tensor | None:
        self.check_context(context)
        return None if context is None else self._context_part(context)

    def weigh_members(self, z: Tensor, embedded: Tensor | None) -> Tensor:
        j, m = z.shape[:2]
        x = self.stem(self._channels(z.flatten(0, 1)))
        if embedded is not None:
            parts, own = x.unflatten(0, (j, m)), embedded[:, None]
            x = (parts + own if torch.is_grad_enabled() else parts.add_(own)).flatten(0, 1)
        if self.training or torch.is_grad_enabled():
            return self._logits(x).unflatten(1, (j, m))
        each = zip(self._folded(), x.tensor_split(self.members, 1), strict=True)
        return torch.stack([member(own) for member, own in each]).unflatten(1, (j, m))

    def standardize(self, z: Tensor, context: Tensor | None = None) -> None:
        """Nothing to do: z comes in the base's coordinate, and batch norm scales the context."""

    @property
    def numbers_per_row(self) -> int:
        return self.width * math.prod(self.latent_shape[1:])

    def _folded(self) -> list[Folded]:
        """Each member's trunk and head for sampling; made anew when any number changed."""
        numbers = [*self.trunk.parameters(), *self.trunk.buffers(), *self.head.parameters()]
        if any(x.is_inference() for x in numbers):  # they do not count their changes
            return self._fold()
        # What is kept along holds the memory, so that no other tensor can come to lie there.
        found = [(x.data_ptr(), x._version) for x in numbers]
        if self._kept is None or [at for at, _ in self._kept[0]] != found:
            held = [(at, x.detach()) for at, x in zip(found, numbers, strict=True)]
            self._kept = held, self._fold()
        return self._kept[1]

    def _fold(self) -> list[Folded]:
        sides = self.latent_shape[1:]
        return [
            fold(self.trunk, self.head, sides, self.members, member)
            for member in range(self.members)
        ]

    def _context_part(self, context: Tensor) -> Tensor:
        return self.context_stem(self.context_norm(self._channels(context)))

    def _channels(self, x: Tensor) -> Tensor:
        """(n, c, h, w), or (G E, n, c, h, w) with rows for each, to (n, G E c, h, w)."""
        if x.ndim == 5:
            return x.transpose(0, 1).flatten(1, 2)
        stack = self.members * self.groups
        return x if stack == 1 else x.repeat(1, stack, 1, 1)

    def _logits(self, x: Tensor) -> Tensor:
        pooled = self.trunk(x).mean((2, 3), keepdim=True)
        return self.head(pooled).flatten(1).T  # (G E, n)


class _Block(nn.Module):
    """skip(x) + SE(BN-Swish-Conv-BN-Swish-Conv)."""

    def __init__(self, stack: int, before: int, after: int, stride: int = 1) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm2d(stack * c) for c in (before, after)])
        self.convs = nn.ModuleList(
            [_Conv(stack, before, after, 3, stride), _Conv(stack, after, after, 3)]
        )
        self.skip: Any = None if stride == 1 else _Conv(stack, before, after, 1, stride)
        self.squeeze = _Conv(stack, after, max(after // 16, 4), 1)
        self.excite = _Conv(stack, max(after // 16, 4), after, 1)

    def forward(self, x: Tensor) -> Tensor:
        change = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            change = conv(F.silu(norm(change), inplace=True))
        pooled = change.mean((2, 3), keepdim=True)
        gate = self.excite(F.relu(self.squeeze(pooled), inplace=True)).sigmoid()
        return torch.addcmul(x if self.skip is None else self.skip(F.silu(x)), change, gate)


class _Conv(nn.Conv2d):
    """`stack` convolutions side by side."""

    def __init__(
        self,
        stack: int,
        before: int,
        after: int,
        kernel: int,
        stride: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(
            stack * before,
            stack * after,
            kernel,
            stride=stride,
            padding=kernel // 2,
            groups=stack,
            bias=bias,
        )
