"""Which rows a step reads: a pure function of the step, so that a resumed run reads the same."""

import torch
from torch import Tensor

from ncprior.numerics import stream


class RowOrder:
    """Batches from one random permutation of `rows` after another."""

    def __init__(self, rows: Tensor, batch_size: int, *, seed: int) -> None:
        self.rows, self.batch_size, self.seed = rows, batch_size, seed
        self._passes: dict[int, Tensor] = {}

    def __call__(self, step: int) -> Tensor:
        """The rows (batch_size,) of this step."""
        n, parts = len(self.rows), []
        position, wanted = step * self.batch_size, self.batch_size
        while wanted:
            number, offset = divmod(position, n)
            part = self._permutation(number)[offset : offset + wanted]
            parts.append(part)
            position, wanted = position + len(part), wanted - len(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutation(self, number: int) -> Tensor:
        if number not in self._passes:
            self._passes = {k: v for k, v in self._passes.items() if k == number - 1}
            order = torch.randperm(len(self.rows), generator=stream(self.seed, "order", number))
            self._passes[number] = self.rows[order]
        return self._passes[number]
