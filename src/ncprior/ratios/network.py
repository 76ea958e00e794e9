"""Networks for log r(z, c) = log q(z | c) / p(z | c): the logit of a classifier.

Several members are trained side by side and their logits are averaged: on small data single
classifiers over-fit and a sampler finds their mistakes.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATION_NUMBERS = 1 << 19
"""Numbers of a layer's output at which sampling is fastest: they stay in a core's cache."""


class RatioNetwork(nn.Module, ABC):
    """E members that map z and a context to a logit; log r is their calibrated mean.

    A network usually belongs to one latent group. For training, those of G groups of equal shape
    are joined into one (`ratios.stacking`): every parameter then has G E slices along its first
    axis and every buffer G, so that all groups go through the same few operations.

    z and context enter by first layers of their own, which are added: what the context contributes
    is computed once per image, however many proposals are weighed (`embed`, then `weigh`).

    Args:
        latent_shape: Event shape of z, or its length.
        context_shape: Shape of the context of one row; None without context.
        members: E.
        groups: G.
    """

    temperature: Tensor
    shift: Tensor

    def __init__(
        self,
        latent_shape: Sequence[int] | int,
        context_shape: Sequence[int] | None,
        members: int,
        groups: int,
    ) -> None:
        super().__init__()
        shape = (latent_shape,) if isinstance(latent_shape, int) else tuple(latent_shape)
        if min(shape) < 1 or members < 1 or groups < 1:
            raise ValueError(
                f"latent_shape, members and groups must be at least 1, got {latent_shape}, "
                f"{members=}, {groups=}"
            )
        self.latent_shape, self.members, self.groups = shape, members, groups
        self.context_shape = None if context_shape is None else tuple(context_shape)
        self.register_buffer("temperature", torch.ones(groups))
        self.register_buffer("shift", torch.zeros(groups))

    @abstractmethod
    def member_logits(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Uncalibrated logits (G E, n) at z (G E, n, *event) and context (G E, n, ...).

        z (n, *event) and context (n, ...) are taken as the same for every member. Each context may
        serve several rows: with n of them, row i of z goes with context i modulo n.
        """

    @abstractmethod
    def embed(self, context: Tensor | None) -> Tensor | None:
        """What context (j, ...) adds to the first layer, its first axis being the row."""

    @abstractmethod
    def weigh_members(self, z: Tensor, embedded: Tensor | None) -> Tensor:
        """Uncalibrated logits (E, j, m) of z (j, m, *event) for j embedded contexts."""

    @property
    @abstractmethod
    def numbers_per_row(self) -> int:
        """Numbers that the largest layer has for one z."""

    @abstractmethod
    def standardize(self, z: Tensor, context: Tensor | None = None) -> None:
        """Centre and scale inputs by the mean and spread of z (n, *event) and context (n, ...)."""

    def weigh(self, z: Tensor, embedded: Tensor | None = None) -> Tensor:
        """log r in nats of z (j, m, *event), m of them for each embedded context, (j, m)."""
        logits = self.weigh_members(z, embedded)
        mean = logits[0] if self.members == 1 else logits.mean(0)
        return torch.addcmul(self.shift, mean, self.temperature)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r(z, context) in nats for z (n, *event), shape (n,).

        Raises:
            ValueError: a context that is missing, or one that was not expected.
        """
        self.check_context(context)
        if context is None:
            return self.weigh(z[None])[0]
        return self.weigh(z[:, None], self.embed(context))[:, 0]

    def check_context(self, context: Tensor | None) -> None:
        if (context is None) != (self.context_shape is None):
            expected = "no context" if self.context_shape is None else "a context"
            raise ValueError(f"this {type(self).__name__} takes {expected}; it is of another group")

    @property
    def chunk(self) -> int:
        """Proposals to weigh at a time."""
        most = ACTIVATION_NUMBERS * (1 if self.temperature.device.type == "cpu" else 64)
        return max(1, most // (self.members * self.numbers_per_row))


def shapes(network: RatioNetwork) -> dict[str, Any]:
    """The arguments that every network has, for its config."""
    return {
        "latent_shape": list(network.latent_shape),
        "context_shape": None if network.context_shape is None else list(network.context_shape),
        "members": network.members,
    }
