"""The residual cells of NVAE's two towers: skip(x) + 0.1 SE(branch(x)).

Reference: Vahdat and Kautz (NeurIPS 2020), section 3.1 and figure 3.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.vaes.nvae.depthwise import depthwise_conv2d
from ncprior.vaes.nvae.layers import NormedConv2d, SqueezeExcitation, batch_norm

RESIDUAL_FACTOR = 0.1


class EncoderCell(nn.Module):
    """Twice batch norm, Swish and a 3x3 convolution; `down` halves sides and doubles channels."""

    def __init__(self, channels: int, *, down: bool = False, squeeze_excitation: bool) -> None:
        super().__init__()
        after = 2 * channels if down else channels
        self.skip = DownSkip(channels, after) if down else None
        self.norm1 = batch_norm(channels)
        self.conv1 = NormedConv2d(channels, after, 3, stride=2 if down else 1)
        self.norm2 = batch_norm(after)
        self.conv2 = NormedConv2d(after, after, 3)
        self.se = SqueezeExcitation(after) if squeeze_excitation else None

    def forward(self, x: Tensor) -> Tensor:
        branch = self.conv1(F.silu(self.norm1(x)))
        branch = self.conv2(F.silu(self.norm2(branch)))
        return _add(x if self.skip is None else self.skip(x), branch, self.se)


class DecoderCell(nn.Module):
    """Expand by 1x1, a depthwise 5x5, project by 1x1; `up` doubles sides and halves channels.

    Its convolutions have no weight norm: a batch norm follows each of them.
    """

    def __init__(
        self, channels: int, *, up: bool = False, expansion: int, squeeze_excitation: bool
    ) -> None:
        super().__init__()
        after = channels // 2 if up else channels
        hidden = expansion * channels
        self.skip = UpSkip(channels, after) if up else None
        self.norm = batch_norm(channels)
        self.expand = nn.Conv2d(channels, hidden, 1, bias=False)
        self.expand_norm = batch_norm(hidden)
        self.depthwise = nn.Conv2d(hidden, hidden, 5, padding=2, groups=hidden, bias=False)
        self.depthwise_norm = batch_norm(hidden)
        self.project = nn.Conv2d(hidden, after, 1, bias=False)
        self.project_norm = batch_norm(after)
        self.se = SqueezeExcitation(after) if squeeze_excitation else None

    def forward(self, x: Tensor) -> Tensor:
        # The paper repeats pixels first. Up to the depthwise convolution all is per pixel, and
        # repetition changes no batch mean or variance, so here it comes later, at a quarter of the
        # cost. Only the n / (n - 1) in the running variances differs.
        branch = F.silu(self.expand_norm(self.expand(self.norm(x))))
        if self.skip is not None:
            branch = F.interpolate(branch, scale_factor=2.0, mode="nearest")
        branch = depthwise_conv2d(branch, self.depthwise.weight)
        branch = self.project(F.silu(self.depthwise_norm(branch)))
        branch = self.project_norm(branch)
        return _add(x if self.skip is None else self.skip(x), branch, self.se)


class DownSkip(nn.Module):
    """Swish, then four 1x1 convolutions of stride 2, one per pixel of each 2x2 block."""

    SHIFTS = ((0, 0), (1, 1), (0, 1), (1, 0))  # rows, columns

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        parts = [after // 4] * 3
        parts.append(after - sum(parts))
        self.convs = nn.ModuleList(NormedConv2d(before, part, 1, stride=2) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        shifted = zip(self.convs, self.SHIFTS, strict=True)
        return torch.cat([conv(x[:, :, row:, column:]) for conv, (row, column) in shifted], 1)


class UpSkip(nn.Module):
    """Bilinear interpolation whose corners are aligned, then a 1x1 convolution."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv = NormedConv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        larger = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.conv(larger)


def _add(skip: Tensor, branch: Tensor, se: SqueezeExcitation | None) -> Tensor:
    if se is None:
        return torch.add(skip, branch, alpha=RESIDUAL_FACTOR)
    return torch.addcmul(skip, branch, RESIDUAL_FACTOR * se(branch))
