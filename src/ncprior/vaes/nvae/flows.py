"""Autoregressive flows of constant volume, and a posterior that is a normal carried by them.

z <- z - m(z), where m at a position depends on the positions before it only, so that the Jacobian
is triangular with ones on its diagonal: log q(z) is the log-density of the normal draw.

Reference: Vahdat and Kautz (NeurIPS 2020), section 3.2; Kingma et al. (2016).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ncprior.normal import Normal
from ncprior.vaes.nvae.layers import MaskedConv2d

HIDDEN = 6  # hidden channels per latent channel


class FlowCell(nn.Module):
    """z (n, L, h, w) less a shift from the positions before; `mirrored` runs the other way."""

    def __init__(self, channels: int, *, mirrored: bool) -> None:
        super().__init__()
        hidden = HIDDEN * channels
        self.conv1 = MaskedConv2d(channels, hidden, 3, channels, strict=True, mirrored=mirrored)
        self.conv2 = MaskedConv2d(hidden, hidden, 5, channels, depthwise=True, mirrored=mirrored)
        self.shift = MaskedConv2d(
            hidden, channels, 1, channels, mirrored=mirrored, initial_scale=0.1, bias=True
        )

    def forward(self, z: Tensor) -> Tensor:
        return z - self._shift(z)

    def inverse(self, value: Tensor) -> Tensor:
        """The z that `forward` takes to `value`, exactly.

        Each sweep settles at least one more position of every image, so that as many sweeps as
        there are positions are enough; usually far fewer are.
        """
        z = value
        for _ in range(value[0].numel()):
            before, z = z, value + self._shift(z)
            if torch.equal(z, before):
                break
        return z

    def _shift(self, z: Tensor) -> Tensor:
        hidden = F.elu(self.conv2(F.elu(self.conv1(z))))
        return self.shift(F.elu(hidden)).to(z.dtype)  # twice ELU is the published network


class Flow(nn.Module):
    """Pairs of cells, the second of which runs the other way."""

    def __init__(self, channels: int, pairs: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(
            FlowCell(channels, mirrored=mirrored)
            for _ in range(pairs)
            for mirrored in (False, True)
        )

    def forward(self, z: Tensor) -> Tensor:
        for cell in self.cells:
            z = cell(z)
        return z

    def inverse(self, value: Tensor) -> Tensor:
        for cell in reversed(self.cells):
            assert isinstance(cell, FlowCell)
            value = cell.inverse(value)
        return value


@dataclass(frozen=True)
class FlowedNormal:
    """The law of flow(z0), where z0 is from `base`; batch (n,), event (L, h, w)."""

    base: Normal
    flow: Flow

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return self.base.batch_shape

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.base.event_shape

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws (*sample_shape, *batch, *event), differentiable, and log q there in nats."""
        start, log_prob = self.base.rsample_and_log_prob(sample_shape, generator=generator)
        return self._through(start, self.flow), log_prob

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        start = self.base.rsample(sample_shape, generator=generator)
        return self._through(start, self.flow)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        return self.rsample(sample_shape, generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats anywhere, by inverting the flow position by position: slow.

        For draws of this very density `rsample_and_log_prob` costs nothing extra.
        """
        return self.base.log_prob(self._through(value, self.flow.inverse))

    def row(self, index: int) -> "FlowedNormal":
        """The density of one row of the batch."""
        return FlowedNormal(self.base.row(index), self.flow)

    def _through(self, value: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`function` of (*batch, L, h, w) as one batch of any number of axes."""
        return function(value.reshape(-1, *self.event_shape)).view(value.shape)
