"""A log-ratio in stages: the sum of the log-ratios between successive laws on the way from p to q.

Where p and q hardly overlap one classifier separates them perfectly and its logit says little; its
parts can each be learned (Rhodes, Xu and Gutmann, "Telescoping Density-Ratio Estimation", 2020).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.ratios.network import RatioNetwork


class SummedRatio(nn.Module):
    """log r = log r_1 + ... + log r_T.

    Args:
        parts: Networks of the same latents and context, the one next to the base first.
    """

    def __init__(self, parts: Sequence[RatioNetwork]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("parts must hold at least one network, got none")
        shapes = {(part.latent_shape, part.context_shape) for part in parts}
        if len(shapes) > 1:
            raise ValueError(f"parts must be of the same latents and context, got {shapes}")
        self.parts: Any = nn.ModuleList(parts)

    @property
    def config(self) -> dict[str, Any]:
        return {"network": "summed", "parts": [part.config for part in self.parts]}

    def each(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r_1, ..., log r_T in nats at z (n, *event), (T, n)."""
        return torch.stack([part(z, context) for part in self.parts])

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r in nats at z (n, *event), (n,)."""
        return self.each(z, context).sum(0)

    @property
    def chunk(self) -> int:
        """Proposals to weigh at a time."""
        return min(part.chunk for part in self.parts)
