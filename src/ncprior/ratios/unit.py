"""A ratio of one: a group that keeps its base prior."""

from typing import Any

from torch import Tensor, nn


class UnitRatio(nn.Module):
    """log r = 0 everywhere."""

    config: dict[str, Any]

    def __init__(self) -> None:
        super().__init__()
        self.config = {"network": "unit"}

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Zeros (n,) for z (n, *event)."""
        return z.new_zeros(len(z))
