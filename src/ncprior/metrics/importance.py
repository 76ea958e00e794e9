"""Running sums over importance weights, of many images at once."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.tail import tail_shape, tail_size


class Weights(NamedTuple):
    """What the importance weights of each image say, in float64."""

    log_mean: Tensor  # (n,), log of the mean weight, nats
    se: Tensor  # (n,), its standard error, by the delta method
    ess: Tensor  # (n,), effective number of weights
    k_hat: Tensor  # (n,), Pareto shape of the tail (`ncprior.tail`); NaN without a tail


WAITING = 256  # weights of an image that are taken in together


class WeightSums:
    """The sums behind `Weights`, of which memory does not grow with the number of weights.

    Only the largest 3 sqrt(S) weights of each image are kept, for the tail.

    Args:
        num: Weights S that each image will have in the end.
    """

    def __init__(self, num: int) -> None:
        self.num, self.seen, self.kept = num, 0, tail_size(num) + 1
        self.waiting: list[Tensor] = []
        self.sums: tuple[Tensor, Tensor, Tensor] | None = None
        self.largest: Tensor | None = None  # (up to `kept`, n), falling

    def add(self, log_weights: Tensor) -> None:
        """Take in log-weights (s, n) in nats.

        Raises:
            ValueError: NaN or +inf.
        """
        if not (log_weights < math.inf).all():
            raise ValueError(
                "an importance weight is NaN or infinite; the VAE or the ratio network is not "
                "usable on these images"
            )
        self.waiting.append(log_weights)
        self.seen += len(log_weights)
        if sum(map(len, self.waiting)) >= WAITING:
            self._take_in()

    def _take_in(self) -> None:
        new = torch.cat(self.waiting).double()
        self.waiting = []
        top = new.amax(0)
        if self.sums is not None:
            top = torch.maximum(top, self.sums[0])
        floor = torch.where(top.isfinite(), top, 0)
        scaled = (new - floor).exp()
        total, squares = scaled.sum(0), scaled.square().sum(0)
        if self.sums is not None:
            shrink = (self.sums[0] - floor).exp()
            total += self.sums[1] * shrink
            squares += self.sums[2] * shrink.square()
        self.sums = (top, total, squares)
        both = new if self.largest is None else torch.cat([self.largest, new])
        self.largest = both.topk(min(self.kept, len(both)), 0).values

    def summary(self) -> Weights:
        """What all weights taken in say."""
        if self.waiting:
            self._take_in()
        assert self.sums is not None and self.largest is not None and self.seen == self.num
        top, total, squares = self.sums
        ess = total.square() / squares
        return Weights(
            top + total.log() - math.log(self.num),
            (1 / ess - 1 / self.num).clamp_min(0).sqrt(),
            ess,
            tail_shape(self.largest),
        )
