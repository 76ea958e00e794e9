"""The networks of all groups that are fitted, those of equal shape stacked into one."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.ratios import RatioNetwork, join, split
from ncprior.training.pairs import Pairs


class Stacks(nn.Module):
    """K ratio networks that are trained and evaluated at the same time.

    Args:
        ratios: One network per group, in the order of the pairs.
        dealt: Whether the rows of a group are dealt to its members in training; else, and always in
            evaluation, each member sees all of them.
    """

    def __init__(self, ratios: Sequence[RatioNetwork], *, dealt: bool = True) -> None:
        super().__init__()
        self.dealt = dealt
        places: dict[str, list[int]] = {}
        for k, ratio in enumerate(ratios):
            places.setdefault(str(ratio.config), []).append(k)
        self.places = list(places.values())  # which groups are in which stack
        self.num_groups, self.members = len(ratios), ratios[0].members
        self.stacks: Any = nn.ModuleList(
            ratios[ks[0]] if len(ks) == 1 else join([ratios[k] for k in ks]) for ks in self.places
        )

    def forward(self, pairs: Sequence[Pairs]) -> tuple[Tensor, Tensor]:
        """Logits (K, E, n) at posterior and at prior draws: E n rows that are dealt, or n."""
        at: list[Any] = [None] * self.num_groups
        for stack, ks in zip(self.stacks, self.places, strict=True):
            own = [pairs[k] for k in ks]
            both = [self._rows([p.posterior for p in own]), self._rows([p.prior for p in own])]
            context = None if own[0].context is None else self._rows([p.context for p in own])
            logits = stack.member_logits(torch.cat(both, 1), context)
            for k, of_group in zip(ks, logits.unflatten(0, (len(ks), -1)), strict=True):
                at[k] = of_group
        at_q, at_p = torch.stack(at).tensor_split(2, dim=-1)
        return at_q, at_p

    def ratios(self) -> list[Any]:
        """The networks apart again, in the order of the groups; their weights are copies."""
        found: list[Any] = [None] * self.num_groups
        for stack, ks in zip(self.stacks, self.places, strict=True):
            for k, ratio in zip(ks, split(stack), strict=True):
                found[k] = ratio
        return found

    def weights_of(self, state: dict[str, Tensor], k: int) -> dict[str, Tensor]:
        """Views of group k's part of a state dict of this module."""
        for i, ks in enumerate(self.places):
            if k in ks:
                prefix = f"stacks.{i}."
                return {
                    name: value.tensor_split(len(ks))[ks.index(k)] if value.ndim else value
                    for name, value in state.items()
                    if name.startswith(prefix)
                }
        raise KeyError(k)

    def _rows(self, of_groups: Sequence[Any]) -> Tensor:
        """Rows (n, ...) of each group to (G E, n / E or n, ...)."""
        if self.training and self.dealt:
            parts = [rows.unflatten(0, (self.members, -1)) for rows in of_groups]
        else:
            parts = [rows.expand(self.members, *rows.shape) for rows in of_groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
