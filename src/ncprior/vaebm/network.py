"""Energy networks with weight normalisation: a residual convolutional one, and a perceptron."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

SILU_SLOPE = 1.1  # largest slope of SiLU, which divides it


class EnergyNetwork(nn.Module):
    """Images (n, c, h, w) to energies (n,) in nats; all zero before training.

    Residual blocks of two 3x3 convolutions, SiLU / 1.1 as the activation and no batch norm, so that
    an image's energy depends on that image alone. Sides halve between stages, and the last layer
    sees the flattened map.

    Args:
        image_shape: (c, h, w).
        channels: Width of each stage, finest first.
        blocks: Residual blocks in each stage.

    Raises:
        ValueError: no stage, a width or number of blocks below 1, or more stages than the sides
            can be halved.

    Reference: Xiao et al., "VAEBM" (ICLR 2021, arXiv 2010.00654), section 3 and appendix. Without
    their initialisation from data: the last layer starts at zero instead.
    """

    def __init__(
        self, image_shape: Sequence[int], *, channels: Sequence[int] = (64, 128), blocks: int = 1
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1 or blocks < 1:
            raise ValueError(
                "channels must name widths of at least 1 and blocks be at least 1, "
                f"got {list(channels)} and {blocks}"
            )
        colours, height, width = image_shape
        halvings = len(channels) - 1
        if min(height, width) < 2**halvings:
            raise ValueError(
                f"channels has {len(channels)} widths, too many for images of {height}x{width}; "
                "sides halve between them"
            )
        self.image_shape, self.channels, self.blocks = tuple(image_shape), tuple(channels), blocks
        self.stem = _convolution(colours, channels[0], 3)
        stages: list[nn.Module] = []
        for k, (before, after) in enumerate(itertools.pairwise((channels[0], *channels))):
            if k:
                stages.append(nn.AvgPool2d(2))
            stages += [_Block(before if i == 0 else after, after) for i in range(blocks)]
        self.stages = nn.Sequential(*stages)
        coarse = (height >> halvings) * (width >> halvings)
        self.out = _zero(nn.Linear(channels[-1] * coarse, 1))

    @property
    def config(self) -> dict[str, Any]:
        return {
            "image_shape": list(self.image_shape),
            "channels": list(self.channels),
            "blocks": self.blocks,
        }

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(self.stem(2 * images - 1))
        return self.out(_activation(x).flatten(1)).squeeze(1)


class FlatEnergyNetwork(nn.Module):
    """As `EnergyNetwork`, a perceptron on all pixels: far faster on a CPU, for small images.

    Args:
        image_shape: (c, h, w).
        hidden: Widths of the hidden layers.
    """

    def __init__(self, image_shape: Sequence[int], *, hidden: Sequence[int] = (256, 256)) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must name widths of at least 1, got {list(hidden)}")
        self.image_shape, self.hidden = tuple(image_shape), tuple(hidden)
        widths = (math.prod(image_shape), *hidden)
        self.layers = nn.ModuleList(
            weight_norm(nn.Linear(before, after)) for before, after in itertools.pairwise(widths)
        )
        self.out = _zero(nn.Linear(hidden[-1], 1))

    @property
    def config(self) -> dict[str, Any]:
        return {"image_shape": list(self.image_shape), "hidden": list(self.hidden)}

    def forward(self, images: Tensor) -> Tensor:
        x = (2 * images - 1).flatten(1)
        for layer in self.layers:
            x = _activation(layer(x))
        return self.out(x).squeeze(1)


NETWORKS: dict[str, Any] = {"conv": EnergyNetwork, "mlp": FlatEnergyNetwork}


class _Block(nn.Module):
    """x + two convolutions of x, a 1x1 convolution on the way past where the width changes."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.second = _convolution(before, after, 3), _convolution(after, after, 3)
        self.skip: nn.Module = nn.Identity()
        if before != after:
            self.skip = _convolution(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.second(_activation(self.first(_activation(x))))
        return (self.skip(x) + inner) / math.sqrt(2)


def _convolution(before: int, after: int, kernel: int) -> nn.Module:
    return weight_norm(nn.Conv2d(before, after, kernel, padding=kernel // 2))


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _activation(x: Tensor) -> Tensor:
    return F.silu(x) / SILU_SLOPE
