"""SNIS: an energy-inspired prior, learned through the K proposals that it is sampled with."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ncprior.numerics import stream
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, descend, first_weights, ignore
from ncprior.priors.tilted import NUMBERS_AT_ONCE, TiltedNormal, chunks
from ncprior.walk import Repeated


class SNISPrior(TiltedNormal):
    """p(z) e^f(z), sampled by importance resampling of K proposals from a normal p.

    What is sampled is the density p_K of one of K proposals picked in proportion to e^f, which
    tends to p e^f / Z as K grows; it is known by a lower bound (`log_prob_bound`).

    Args:
        latent_size: d.
        proposals: K.
        hidden: Widths of the network f.
        activation: Its activation; see `TiltedNormal`.
        temperature: Factor of the base's standard deviation.

    To train it with a VAE as published, put it under the VAE and train that:
    `train_vae(FlatVAE(..., prior=SNISPrior(d)), data)`. The bound then takes the place of log p(z),
    with K - 1 fresh proposals that a batch shares, drawn from torch's own generator as dropout is.

    Reference: Lawson et al., "Energy-Inspired Models" (NeurIPS 2019, arXiv 1910.14265),
    section 3.2 and its program.
    """

    normalized = False
    slow_draws = True

    def __init__(
        self,
        latent_size: int,
        *,
        proposals: int = 128,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(latent_size, hidden=hidden, activation=activation, temperature=temperature)
        if proposals < 1:
            raise ValueError(f"proposals must be at least 1, got {proposals}")
        self.proposals = proposals

    @property
    def config(self) -> dict[str, Any]:
        return super().config | {"proposals": self.proposals}

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d) of p_K, each from K proposals of its own."""
        num, m = math.prod(sample_shape), self.proposals
        draws = [self.loc.new_empty(0, self.latent_size)]
        for count in chunks(num, max(1, NUMBERS_AT_ONCE // (m * self.latent_size))):
            z = self.base_sample((count, m), generator=generator)
            weights = self.score(z).softmax(-1)
            pick = torch.multinomial(weights, 1, generator=generator)  # (count, 1)
            draws.append(z.take_along_dim(pick[..., None], 1).squeeze(1))
        return torch.cat(draws).view(*sample_shape, self.latent_size)

    def unnormalized_log_prob(self, value: Tensor) -> Tensor:
        """log p(z) + f(z) in nats of z (..., d), (...): the limit of p_K, up to log Z."""
        return self.base_log_prob(value) + self.score(value)

    def log_prob_bound(
        self, value: Tensor, *, generator: Generator | None = None, draws: int = 1
    ) -> Tensor:
        """A random lower bound in the mean of log p_K(z) in nats, z (..., d), (...).

        log p(z) + f(z) - log[(e^f(z) + sum_j e^f(z_j)) / K] with K - 1 proposals z_j from p, which
        all of `value` shares. With several `draws` of them the mean of 1 / [...] takes its place;
        the bound rises and reaches log p_K(z) in the limit.

        Args:
            value: z (..., d).
            generator: Source of the proposals.
            draws: Sets of proposals.
        """
        own = self.score(value)
        others = self.base_sample((draws, self.proposals - 1), generator=generator)
        pool = self.score(others).logsumexp(-1)  # (draws,)
        mean = torch.logaddexp(own[..., None], pool) - math.log(self.proposals)  # (..., draws)
        inverse = (-mean).logsumexp(-1) - math.log(draws)
        return self.base_log_prob(value) + own + inverse

    def rows(self, num: int) -> "BoundedRows":
        """The density for each of `num` rows of a walk, by its bound."""
        return BoundedRows(self, num)

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        proposals: int = 1024,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        matched: bool = True,
        steps: int = 4000,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        heldout: float = 0.1,
        patience: int = 10,
        seed: int = 0,
        report: Report = ignore,
    ) -> "SNISPrior":
        """Fit to codes by the mean of `log_prob_bound`; the best held-out weights are kept.

        Args:
            codes: What the encoder says of the training images.
            proposals: K, in the fit and afterwards; published 128, in the paper up to 1000.
            hidden: Widths of the network.
            activation: Its activation.
            matched: Give the base the codes' mean and spread; False leaves it N(0, I), as
                published.
            steps, batch_size, learning_rate, weight_decay, patience: See `descend`.
            heldout: Share of the codes that only decide when to stop.
            seed: Decides the weights, the batches and what is held out.
            report: See `descend`.

        Raises:
            ValueError: codes that cannot be fitted, or a setting out of range.
        """
        train, left = codes.checked().split(heldout, seed=seed)
        with first_weights(seed):
            prior = cls(
                codes.latent_size, proposals=proposals, hidden=hidden, activation=activation
            )
        prior.to(codes.loc)
        if matched:
            prior.standardize(train)
        device = codes.loc.device
        left_out = left.draw(
            max(2000, len(left.loc)), generator=stream(seed, "held-out draws", device=device)
        )

        def loss(generator: Generator) -> Tensor:
            z = train.draw(batch_size, generator=generator)
            return -prior.log_prob_bound(z, generator=generator).mean()

        def heldout_loss() -> float:
            generator = stream(seed, "held-out proposals", device=device)
            return -float(prior.log_prob_bound(left_out, generator=generator, draws=16).mean())

        descend(
            prior,
            loss,
            heldout_loss,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            patience=patience,
            seed=seed,
            report=report,
        )
        return prior.requires_grad_(False)


class BoundedRows(Repeated):
    """An SNIS prior for each row; its `log_prob` is the bound that Lawson et al. train with."""

    def log_prob(self, value: Tensor) -> Tensor:
        """The bound in nats: with fresh proposals in training, with fixed ones otherwise.

        Of these there are 16 pools: what one does to the bound, it does to all of `value`.
        """
        prior = self.density
        if prior.training:
            return prior.log_prob_bound(value)
        fixed = stream(0, "SNIS proposals", device=value.device)
        return prior.log_prob_bound(value, generator=fixed, draws=16)
