"""All classifiers that are fitted at the same time, as a job of the training loop."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ncprior.numerics import LogZ, stream, stream_seed
from ncprior.ratios import NETWORKS, RatioNetwork, nce_loss
from ncprior.ratios.nce import LOG_2
from ncprior.training.evidence import EvidenceStream, EvidenceTable
from ncprior.training.heldout import NUMBERS_AT_ONCE
from ncprior.training.order import RowOrder
from ncprior.training.pairs import Pairs, draw_pairs
from ncprior.training.stacks import Stacks
from ncprior.walk import Evidence

DrawPairs = Callable[[Evidence, int, Generator], list[Pairs]]
"""Evidence of n images, n and a generator to n pairs of each group."""


SEEN_IMAGES = 5000
NOTHING_FOUND = 2 * (LOG_2 - 0.01)
"""Held-out loss above which a classifier has found nothing, whose chance level is 2 log 2."""


class Fitted(NamedTuple):
    """What a fit found."""

    ratios: dict[int, nn.Module]  # by latent group
    judged: dict[int, dict[str, Any]]  # their figures (`calibrate_and_judge`)
    steps: int  # of the optimiser
    log_z: LogZ | None = None


class RatioJob:
    """All classifiers of `groups` at the same time, from one walk of the frozen VAE a step.

    Args:
        ratios: A network for each group.
        vae: The frozen VAE.
        table: The evidence of the training images.
        heldout: Pairs of held-out images, and which groups they are of.
        batch_size: Pairs per step for each member; with a view the same for all of them.
        steps: How many there are to be at most.
        patience: Evaluations without improvement after which a group stops. A single group that has
            found nothing yet does not count those of the first half of the steps: next to a good
            base a loss stays where chance has it for a thousand steps before it falls.
        seed: Seed of the order of the images.
        noise_ratio: See `nce_loss`.
        of_vae: Fingerprint of the VAE.
        draw: What to tell apart, if not draws of the posterior and of the base prior.
    """

    def __init__(
        self,
        ratios: list[RatioNetwork],
        vae: Any,
        table: EvidenceTable | EvidenceStream,
        heldout: Any,
        *,
        batch_size: int,
        steps: int,
        patience: int,
        seed: int,
        noise_ratio: float = 1.0,
        of_vae: str = "",
        draw: DrawPairs | None = None,
    ) -> None:
        dealt = heldout.view is None  # what a view shows costs more than what members make of it
        self.module = Stacks(ratios, dealt=dealt)
        self.table, self.heldout = table, heldout
        self.draw = draw or partial(draw_pairs, vae, groups=heldout.groups, view=heldout.view)
        self.rows_per_step = batch_size * (self.module.members if dealt else 1)
        self.order = RowOrder(torch.arange(len(table)), self.rows_per_step, seed=seed)
        self.noise_ratio, self.patience, self.of_vae = noise_ratio, patience, of_vae
        self.half = steps / 2
        count = self.module.num_groups
        self.best_loss, self.best_step = [math.inf] * count, [0] * count
        self.since_best = [0] * count
        self.best_weights: dict[str, Tensor] = {}

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.table.advance(step)
        evidence = self.table[self.order(step).to(self.table.device)]
        pairs = self.draw(evidence, self.rows_per_step, generator)
        at_q, at_p = model(pairs)
        losses = nce_loss(at_q, at_p, self.noise_ratio)  # (K, E)
        return losses.sum(), {"train_loss": losses.mean()}

    def evaluate(self, step: int) -> dict[str, float]:
        found = self.logits(self.heldout)
        losses = [float(nce_loss(*at)) for at in found]
        state = self.module.state_dict()
        if not self.best_weights:
            self.best_weights = {name: value.clone() for name, value in state.items()}
        alone = len(losses) == 1
        for k, loss in enumerate(losses):
            if self.since_best[k] >= self.patience:
                continue  # stopped, whatever the groups that go on make of it
            searching = alone and step < self.half and self.best_loss[k] > NOTHING_FOUND
            self.since_best[k] += not searching
            if loss < self.best_loss[k]:
                self.best_loss[k], self.best_step[k], self.since_best[k] = loss, step, 0
                own = self.module.weights_of(state, k)
                for name, kept in self.module.weights_of(self.best_weights, k).items():
                    kept.copy_(own[name])
        figures = {"heldout_loss": sum(losses) / len(losses)}
        if len(losses) > 1:
            groups = self.heldout.groups
            figures |= {f"heldout_loss_{k}": x for k, x in zip(groups, losses, strict=True)}
        return figures

    @torch.no_grad()
    def logits(self, pairs: Iterable[list[Pairs]]) -> list[tuple[Tensor, Tensor]]:
        """Uncalibrated logits of each group at all its posterior and prior draws, each (n,)."""
        self.module.eval()
        pieces = []
        for part in pairs:
            for piece in _pieces(part, self.module):
                pieces.append(tuple(at.mean(1) for at in self.module(piece)))
        self.module.train()
        at_q, at_p = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
        return list(zip(at_q, at_p, strict=True))

    def should_stop(self) -> bool:
        return min(self.since_best) >= self.patience

    def identity(self) -> dict[str, Any]:
        return {
            "VAE (fingerprint)": self.of_vae,
            "groups": list(self.heldout.groups),
            "batch_size": self.rows_per_step,
            "training images": len(self.table),
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("best_loss", "best_step", "since_best", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        device = self.table.device
        self.best_weights = {name: v.to(device) for name, v in self.best_weights.items()}


def _pieces(pairs: list[Pairs], module: Stacks) -> Iterator[list[Pairs]]:
    """Rows of all groups a few thousand at a time."""
    rows = 2 * max(stack.chunk for stack in module.stacks)
    for first in range(0, len(pairs[0].posterior), rows):
        some = slice(first, first + rows)
        yield [
            Pairs(q[some], p[some], None if context is None else context[some])
            for q, p, context in pairs
        ]


def seen_pairs(
    vae: Any, table: EvidenceTable | EvidenceStream, held: Any, seed: int
) -> list[Pairs]:
    """Pairs of some of the images that the ratios are fitted on, one draw of each."""
    numbers = sum(x[0].numel() for pair in held.example for x in pair if x is not None)
    seen = torch.arange(min(len(table), SEEN_IMAGES, NUMBERS_AT_ONCE // numbers + 1))
    generator = stream(seed, "seen", device=table.device)
    evidence = table[seen.to(table.device)]
    return draw_pairs(vae, evidence, len(seen), generator, held.groups, held.view)


@torch.no_grad()
def log_ratios(ratio: Any, pairs: Iterable[list[Pairs]]) -> tuple[Tensor, Tensor]:
    """log r of one group at all its posterior and prior draws, each (n,)."""
    parts = [
        [torch.cat([ratio(z) for z in draws.split(ratio.chunk)]) for draws in part[0][:2]]
        for part in pairs
    ]
    at_q, at_p = (torch.cat(of) for of in zip(*parts, strict=True))
    return at_q, at_p


def new_ratios(settings: dict[str, Any], held: Any, seed: int) -> list[RatioNetwork]:
    """A fresh network for each group, its weights a function of the seed and the group alone."""
    make, ratios = NETWORKS[settings["network"]], []
    for k, pair in zip(held.groups, held.example, strict=True):
        context = None if pair.context is None else pair.context.shape[1:]
        with torch.random.fork_rng([]):
            torch.manual_seed(stream_seed(seed, "ratio weights", k))
            ratio = make(
                pair.posterior.shape[1:], context_shape=context, **settings["network_options"]
            )
        ratios.append(ratio.to(pair.posterior))
    first = next(iter(held))
    for ratio, pair in zip(ratios, first, strict=True):
        ratio.standardize(torch.cat([pair.posterior, pair.prior]), pair.context)
    return ratios
