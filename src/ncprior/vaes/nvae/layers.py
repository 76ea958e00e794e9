"""The convolutions of NVAE, and activations that are computed again instead of being kept."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPSILON = 1e-5


class NormedConv2d(nn.Conv2d):
    """A convolution whose weight is e^g w / (|w| + 1e-5), g and |w| being per output channel.

    It starts at the plain convolution: e^g is the initial |w| + 1e-5. Same padding.

    Reference: Salimans and Kingma (2016), with the logarithm of the norm as parameter.
    """

    def __init__(
        self, before: int, after: int, kernel: int, *, stride: int = 1, bias: bool = True
    ) -> None:
        super().__init__(before, after, kernel, stride=stride, padding=kernel // 2, bias=bias)
        self.log_weight_norm = nn.Parameter(_norm(self.weight).log())

    def effective_weight(self) -> Tensor:
        """What the convolution uses, (out, in, kernel, kernel), differentiable."""
        return self.weight * (self.log_weight_norm.exp() / _norm(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.effective_weight(), self.bias)


class MaskedConv2d(nn.Conv2d):
    """A normed convolution in which a position sees itself and those before it only.

    Positions are ordered by row, then column, then latent channel; consecutive hidden channels
    share the place of one latent channel. The norm is that of the masked weight. Same padding.

    Args:
        before, after: Channels, multiples of `channels`.
        channels: Latent channels L, whose order is kept.
        depthwise: One filter per channel.
        strict: A position does not see itself.
        mirrored: Pixels are ordered the other way; the channels of one are not.
        initial_scale: Factor on the initial weights.
    """

    mask: Tensor

    def __init__(
        self,
        before: int,
        after: int,
        kernel: int,
        channels: int,
        *,
        depthwise: bool = False,
        strict: bool = False,
        mirrored: bool = False,
        initial_scale: float = 1.0,
        bias: bool = False,
    ) -> None:
        groups = before if depthwise else 1
        super().__init__(before, after, kernel, padding=kernel // 2, groups=groups, bias=bias)
        mask = torch.ones(after, 1 if depthwise else before, kernel, kernel)
        middle = kernel // 2
        mask[:, :, middle + 1 :] = 0
        mask[:, :, middle, middle + 1 :] = 0
        place_after = torch.arange(after)[:, None] // (after // channels)
        place_before = torch.arange(before)[None] // (before // channels)
        here = place_before < place_after if strict else place_before <= place_after
        mask[:, :, middle, middle] = float(not strict) if depthwise else here.float()
        if mirrored:
            mask = mask.flip(2, 3)
        self.register_buffer("mask", mask, persistent=False)
        with torch.no_grad():
            self.weight.mul_(initial_scale)
        self.log_weight_norm = nn.Parameter(_norm(self.weight * mask).log())

    def effective_weight(self) -> Tensor:
        """What the convolution uses, (out, in, kernel, kernel), differentiable."""
        weight = self.weight * self.mask
        return weight * (self.log_weight_norm.exp() / _norm(weight))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.effective_weight(), self.bias)


class SqueezeExcitation(nn.Module):
    """A factor in (0, 1) per image and channel, (n, c, 1, 1), from the means over the picture."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.squeeze(x.mean((2, 3))))
        return self.excite(hidden).sigmoid()[:, :, None, None]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-5, momentum=0.05)


def recomputed(cell: nn.Module, x: Tensor) -> Tensor:
    """cell(x), of which only x is kept for the backward pass."""
    return checkpoint(
        cell,
        x,
        use_reentrant=False,
        preserve_rng_state=False,  # no cell draws
        context_fn=lambda: (nullcontext(), _same_statistics(cell)),
    )


@contextmanager
def _same_statistics(cell: nn.Module) -> Iterator[None]:
    """Batch norms normalise as in training, but leave their running statistics as they are."""
    norms = [module for module in cell.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count


def _norm(weight: Tensor) -> Tensor:
    """|w| + 1e-5 per output channel, (out, 1, 1, 1)."""
    return torch.linalg.vector_norm(weight, dim=(1, 2, 3), keepdim=True) + NORM_EPSILON
