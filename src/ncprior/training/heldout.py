"""Draws of held-out images: the same at every evaluation, kept in memory where they fit."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ncprior.numerics import stream
from ncprior.training.evidence import encode
from ncprior.training.pairs import Pairs, View, draw_pairs
from ncprior.training.vae import kl_divergence
from ncprior.walk import Evidence, Group, walk

DRAWS = 10_000
KEPT_NUMBERS = 1 << 28  # one GiB of pairs
NUMBERS_AT_ONCE = 1 << 25


class HeldOut:
    """Pairs of held-out images, several draws of each where that is cheap.

    Iterating gives lists of pairs (one per group of `groups`), a part of the rows at a time, in the
    order: all images, then all again for the next draw of each.

    Args:
        vae: The frozen VAE, in evaluation mode, on `device`.
        data: The images.
        rows: The held-out rows of `data`.
        groups: The groups whose pairs are wanted.
        seed: Seed of the draws.
        view: What the networks are shown of latents; the latents themselves by default.
    """

    def __init__(
        self,
        vae: Any,
        data: Any,
        rows: Tensor,
        groups: Sequence[int],
        *,
        seed: int,
        device: torch.device | str = "cpu",
        view: View | None = None,
    ) -> None:
        self.vae, self.data, self.rows, self.groups, self.view = vae, data, rows, groups, view
        self.seed, self.device = seed, device
        self.images = len(rows)
        example = self._draw(rows[:2], 0)
        numbers = sum(part[0].numel() for pair in example for part in pair if part is not None)
        self.example = example
        self.parts = rows.split(max(1, NUMBERS_AT_ONCE // numbers))
        copies = max(1, min(50, DRAWS // self.images))
        self.kept: list[list[Pairs]] | None = None
        if copies * self.images * numbers <= KEPT_NUMBERS:
            generator = stream(seed, "heldout draws", device=device)
            evidence = self._evidence(rows, 0)
            self.kls = self._of_wanted(_kl_sums(vae, evidence, generator))
            repeated = tuple(e.repeat(copies, *[1] * (e.ndim - 1)) for e in evidence)
            num = copies * self.images
            self.kept = [draw_pairs(vae, repeated, num, generator, groups, view)]
        else:
            sums = [
                self._of_wanted(
                    _kl_sums(vae, self._evidence(part, i), stream(seed, "heldout kl", i, device))
                )
                for i, part in enumerate(self.parts)
            ]
            self.kls = [sum(of_part) for of_part in zip(*sums, strict=True)]

    def __iter__(self) -> Iterator[list[Pairs]]:
        if self.kept is not None:
            yield from self.kept
            return
        for i, part in enumerate(self.parts):
            yield self._draw(part, i)

    def unviewed(self) -> "HeldOut":
        """The same draws, the latents themselves."""
        if self.view is None:
            return self
        return HeldOut(
            self.vae, self.data, self.rows, self.groups, seed=self.seed, device=self.device
        )

    def _evidence(self, rows: Tensor, part: int) -> Evidence:
        generator = stream(self.seed, "heldout", part)
        return encode(self.vae, self.data, rows, generator=generator, device=self.device)

    def _draw(self, rows: Tensor, part: int) -> list[Pairs]:
        generator = stream(self.seed, "heldout draws", part, self.device)
        evidence = self._evidence(rows, part)
        return draw_pairs(self.vae, evidence, len(rows), generator, self.groups, self.view)

    def _of_wanted(self, sums: list[float]) -> list[float]:
        return [sums[k] / self.images for k in self.groups]


@torch.no_grad()
def _kl_sums(vae: Any, evidence: Evidence, generator: Generator) -> list[float]:
    """KL(q || p) in nats of each group, summed over the images."""
    sums: list[float] = []

    def choose(_: int, group: Group) -> Tensor:
        assert group.posterior is not None
        z, log_q = group.posterior.rsample_and_log_prob(generator=generator)
        sums.append(float(kl_divergence(group, z, log_q).sum()))
        return z

    walk(vae, choose, len(evidence[0]), evidence)
    return sums
