"""What the frozen encoder says of every training image, computed once and kept where it fits.

Where the input is drawn anew on each pass (dynamic binarisation, flips) the kept values are
refreshed a slice at a step, so that over time each image is encoded from many draws and a batch
still follows q(z). Which draw a slice holds is a function of the step alone: a resumed run rebuilds
the same table.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ncprior.numerics import stream
from ncprior.walk import Evidence

KEPT_NUMBERS = 1 << 29  # two GiB of evidence


def evidence_of(
    vae: Any,
    data: Any,
    rows: Tensor,
    *,
    slices: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> "EvidenceTable | EvidenceStream":
    """The table, or where the evidence of all rows is too large, what encodes each batch anew."""
    probe = encode(vae, data, rows[:2], generator=stream(seed, "evidence probe"), device=device)
    if len(rows) * sum(math.prod(part.shape[1:]) for part in probe) > KEPT_NUMBERS:
        return EvidenceStream(vae, data, rows, seed=seed, device=device)
    return EvidenceTable(vae, data, rows, slices=slices, seed=seed, device=device)


class EvidenceStream:
    """Evidence of rows 0..n-1 of `rows`, encoded when it is asked for; as `EvidenceTable`."""

    def __init__(
        self,
        vae: Any,
        data: Any,
        rows: Tensor,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.vae, self.data, self.rows, self.seed, self.device = vae, data, rows, seed, device
        self.step = 0

    def advance(self, step: int) -> None:
        """The step whose draws of the input come next."""
        self.step = step

    def __getitem__(self, positions: Tensor) -> Evidence:
        rows = self.rows[positions.cpu()]
        generator = stream(self.seed, "evidence", self.step)
        return encode(self.vae, self.data, rows, generator=generator, device=self.device)

    def __len__(self) -> int:
        return len(self.rows)


class EvidenceTable:
    """Evidence of rows 0..n-1 of `rows`, indexable by position.

    Args:
        vae: The frozen VAE, in evaluation mode, on `device`.
        data: The images.
        rows: Rows of `data`, (n,).
        slices: Steps after which each image has been encoded anew; ignored where the input is
            always the same.
        seed: Seed of the draws of the input.
    """

    def __init__(
        self,
        vae: Any,
        data: Any,
        rows: Tensor,
        *,
        slices: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        step: int = 0,
    ) -> None:
        self.vae, self.data, self.seed, self.device = vae, data, seed, device
        self.slices = slices if data.redrawn else 0
        self.parts = rows.tensor_split(max(1, min(slices, len(rows)))) if self.slices else [rows]
        self.tensors: Evidence = ()
        self.rebuild(step)

    def rebuild(self, step: int) -> None:
        """The table as it stands at `step`."""
        count = len(self.parts)
        drawn = [step - (step - j) % count for j in range(count)]  # the last refresh of each slice
        pieces = [self._encode(j, drawn[j]) for j in range(count)]
        self.tensors = tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))
        self.edges = [0]
        for part in self.parts:
            self.edges.append(self.edges[-1] + len(part))
        self.step = step

    def advance(self, step: int) -> None:
        """Bring the table to `step`, which is usually the one after the last."""
        if not self.slices or step == self.step:
            self.step = step
            return
        if step != self.step + 1:
            self.rebuild(step)
            return
        j = step % len(self.parts)
        for kept, fresh in zip(self.tensors, self._encode(j, step), strict=True):
            kept[self.edges[j] : self.edges[j + 1]] = fresh
        self.step = step

    def __getitem__(self, positions: Tensor) -> Evidence:
        return tuple(tensor[positions] for tensor in self.tensors)

    def __len__(self) -> int:
        return self.edges[-1]

    def _encode(self, j: int, step: int) -> Evidence:
        generator = stream(self.seed, "evidence", step + len(self.parts))
        return encode(self.vae, self.data, self.parts[j], generator=generator, device=self.device)


@torch.no_grad()
def encode(
    vae: Any,
    data: Any,
    rows: Tensor,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1000,
) -> Evidence:
    """Evidence of the images in `rows`, batch by batch."""
    pieces = [
        vae.encode(data.batch(part, generator=generator).to(device))
        for part in rows.split(batch_size)
    ]
    return tuple(torch.cat(tensors) for tensors in zip(*pieces, strict=True))
