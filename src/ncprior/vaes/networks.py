"""Encoders and decoders: an MLP and a convolutional pair, sized by their arguments."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.products import Linear, affine


class Tanh(nn.Module):
    """tanh, and without a graph 2 sigmoid(2x) - 1 in place, which a CPU does in half the time.

    Not in half precision, in which that would round small values away.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or not x.is_cpu or x.element_size() < 4:
            return x.tanh()
        return x.mul_(2).sigmoid_().mul_(2).sub_(1)


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": Tanh,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
}


class MLPEncoder(nn.Module):
    """x less the training mean, through hidden layers, to (n, 2 d), or (n, d) for a code alone."""

    image_mean: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_size: int,
        hidden: Sequence[int],
        activation: str,
        outputs_per_latent: int = 2,
    ) -> None:
        super().__init__()
        self.register_buffer("image_mean", torch.zeros(math.prod(image_shape)))
        sizes = [math.prod(image_shape), *hidden, outputs_per_latent * latent_size]
        self.layers = _mlp(sizes, activation)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images.flatten(1) - self.image_mean)


class MLPDecoder(nn.Module):
    """z through hidden layers to (n, outputs * c, h, w), plus a fixed offset per output.

    The offset is the likelihood's parameter for the mean training image, so that training starts
    from there (method of LARS and SNIS).
    """

    offset: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_size: int,
        hidden: Sequence[int],
        activation: str,
        outputs_per_pixel: int,
        squash: bool,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.shape = (outputs_per_pixel * channels, height, width)
        self.squash = squash
        self.register_buffer("offset", torch.zeros(math.prod(self.shape)))
        self.layers = _mlp([latent_size, *hidden[::-1], math.prod(self.shape)], activation)

    def hidden(self, z: Tensor) -> Tensor:
        """The last hidden layer, (n, width)."""
        found: Tensor = self.layers[:-1](z)
        return found

    def forward(self, z: Tensor) -> Tensor:
        last: Any = self.layers[-1]
        bias = last.bias + self.offset  # one pass over the outputs fewer than adding it to them
        outputs = affine(self.hidden(z), last.weight.T, bias).unflatten(1, self.shape)
        return outputs.sigmoid() if self.squash else outputs


class ConvEncoder(nn.Module):
    """Stride-2 convolutions with batch norm and ReLU, then a linear layer to (n, 2 d) or (n, d)."""

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_size: int,
        channels: Sequence[int],
        kernel: int,
        outputs_per_latent: int = 2,
    ) -> None:
        super().__init__()
        widths = [image_shape[0], *channels]
        blocks = [
            nn.Sequential(
                nn.Conv2d(before, after, kernel, stride=2, padding=kernel // 2),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after in itertools.pairwise(widths)
        ]
        height, width = image_shape[1:]
        for _ in channels:
            height, width = (height + 1) // 2, (width + 1) // 2
        self.blocks = nn.Sequential(*blocks, nn.Flatten())
        self.head = nn.Linear(channels[-1] * height * width, outputs_per_latent * latent_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(images))


class ConvDecoder(nn.Module):
    """A linear layer to the coarsest map, stride-2 transposed convolutions, one to the pixels.

    With L widths there are L - 1 doublings (RAE, Ghosh et al. 2020), so that height and width must
    be divisible by 2^(L - 1).
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        latent_size: int,
        channels: Sequence[int],
        kernel: int,
        outputs_per_pixel: int,
        squash: bool,
    ) -> None:
        super().__init__()
        colours, height, width = image_shape
        factor = 2 ** (len(channels) - 1)
        if height % factor or width % factor:
            raise ValueError(
                f"channels has {len(channels)} widths, so image sides must be divisible by "
                f"{factor}, got {height}x{width}; use fewer widths or another image_size"
            )
        widths = list(channels[::-1])
        self.coarse = (widths[0], height // factor, width // factor)
        self.squash = squash
        self.stem = nn.Linear(latent_size, math.prod(self.coarse))
        pad = kernel // 2
        blocks = [
            nn.Sequential(
                nn.ConvTranspose2d(
                    before,
                    after,
                    kernel,
                    stride=2,
                    padding=pad,
                    output_padding=2 * pad + 2 - kernel,
                ),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after in itertools.pairwise(widths)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.ConvTranspose2d(
            widths[-1], outputs_per_pixel * colours, kernel, padding=(kernel - 1) // 2
        )

    def forward(self, z: Tensor) -> Tensor:
        outputs = self.head(self.blocks(self.stem(z).unflatten(1, self.coarse)))
        return outputs.sigmoid() if self.squash else outputs


def _mlp(sizes: Sequence[int], activation: str) -> nn.Sequential:
    """Linear layers, Glorot-uniform with zero biases, with the activation between them."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layer = Linear(before, after)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])
