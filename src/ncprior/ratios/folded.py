"""A trained convolutional trunk as sampling runs it: the same function, with less to do.

SIR weighs hundreds of proposals per image, so that what a layer does beside its products counts:

- A batch norm behind a convolution is folded into it; one in front is a factor and a shift.
- On maps of at most 2x2 pixels most taps of a 3x3 filter meet padding. There a convolution is one
  product with the matrix of what it does to the whole map, and padding costs nothing.
- Activations and sums are written over what they were made of.

Only rounding differs from the layers themselves.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.ratios.scratch import scratch

DENSE_PIXELS = 4
"""Maps of so many pixels, or fewer, are convolved by one product of matrices."""


class Convolution(NamedTuple):
    """A convolution with its bias, or what it is to a flattened map."""

    weight: Tensor  # (out, in, kernel, kernel), or with `matrix` (in h w, out h' w')
    bias: Tensor  # (out,), or (out h' w',)
    stride: int
    matrix: bool
    shape: tuple[int, int, int]  # of a map that comes out

    def __call__(self, x: Tensor, slot: int) -> Tensor:
        """x (n, in, h, w) to (n, *shape); the product of matrices lies in scratch `slot`."""
        if not self.matrix:
            padding = self.weight.shape[-1] // 2
            return F.conv2d(x, self.weight, self.bias, self.stride, padding)
        out = scratch(slot, x, (len(x), len(self.bias)))
        torch.addmm(self.bias, x.flatten(1), self.weight, out=out)
        return out.view(-1, *self.shape)


class Block(NamedTuple):
    """A residual block of `ConvRatio`, its norms resolved."""

    factor: Tensor  # (in h w,), with `offset` the first batch norm
    offset: Tensor
    convs: tuple[Convolution, Convolution]
    skip: Convolution | None
    squeeze: tuple[Tensor, Tensor]  # weight (in, out) and bias
    excite: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, in, h, w), which is overwritten, to (n, out, h', w')."""
        change = scratch(2, x, tuple(x.shape))
        torch.addcmul(self.offset, x.flatten(1), self.factor, out=change.flatten(1))
        change = self.convs[0](F.silu(change, inplace=True), 3)
        change = self.convs[1](F.silu(change, inplace=True), 2)
        pooled = change.flatten(2).mean(2)
        hidden = torch.addmm(self.squeeze[1], pooled, self.squeeze[0]).relu_()
        gate = torch.addmm(self.excite[1], hidden, self.excite[0]).sigmoid_()[..., None, None]
        if self.skip is None:
            return x.addcmul_(change, gate)
        return self.skip(F.silu(x, inplace=True), 4).addcmul_(change, gate)


class Folded(NamedTuple):
    """Trunk and head of one member."""

    blocks: list[Block]
    head: tuple[Tensor, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, width, h, w), which is overwritten, to logits (n,)."""
        for block in self.blocks:
            x = block(x)
        return torch.addmm(self.head[1], x.flatten(2).mean(2), self.head[0])[:, 0]


@torch.no_grad()
def fold(trunk: Any, head: nn.Conv2d, sides: Sequence[int], members: int, member: int) -> Folded:
    """The blocks `trunk` and `head` of one of the `members` stacked along their channels.

    Args:
        trunk: Blocks of a `ConvRatio` with their batch norms in evaluation mode.
        head: Its last layer, 1x1.
        sides: (h, w) of the maps that enter.
        members: Networks stacked.
        member: Which of them.
    """
    part = lambda x: x.tensor_split(members)[member]
    blocks = []
    sides = tuple(sides)
    for block in trunk:
        (factor, offset), (scale, shift) = (
            tuple(part(x) for x in _affine(norm)) for norm in block.norms
        )
        first, second = ((part(c.weight), part(c.bias)) for c in block.convs)
        folded = first[0] * scale[:, None, None, None], first[1] * scale + shift
        stride, pixels = block.convs[0].stride[0], sides[0] * sides[1]
        one = _convolution(*folded, stride, sides)
        two = _convolution(*second, 1, one.shape[1:])
        skip = None
        if block.skip is not None:
            skip = _convolution(part(block.skip.weight), part(block.skip.bias), stride, sides)
        blocks.append(
            Block(
                factor.repeat_interleave(pixels),
                offset.repeat_interleave(pixels),
                (one, two),
                skip,
                _linear(part(block.squeeze.weight), part(block.squeeze.bias)),
                _linear(part(block.excite.weight), part(block.excite.bias)),
            )
        )
        sides = one.shape[1:]
    return Folded(blocks, _linear(part(head.weight), part(head.bias)))


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation mode as factor and offset of each channel."""
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return factor, norm.bias - norm.running_mean * factor


def _convolution(weight: Tensor, bias: Tensor, stride: int, sides: Sequence[int]) -> Convolution:
    out, before, kernel, _ = weight.shape
    h, w = ((side - 1) // stride + 1 for side in sides)
    if sides[0] * sides[1] > DENSE_PIXELS:
        return Convolution(weight.contiguous(), bias, stride, False, (out, h, w))
    size = before * sides[0] * sides[1]
    each = torch.eye(size, dtype=weight.dtype, device=weight.device).view(-1, before, *sides)
    matrix = F.conv2d(each, weight, None, stride, kernel // 2).flatten(1)
    return Convolution(matrix, bias.repeat_interleave(h * w), stride, True, (out, h, w))


def _linear(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A 1x1 convolution as the product that it is."""
    return weight.flatten(1).T.contiguous(), bias
