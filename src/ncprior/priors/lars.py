"""LARS: a resampled prior, the law of truncated rejection sampling with a learned acceptance."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ncprior.normal import Normal
from ncprior.numerics import mean_and_se, stream
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, descend, first_weights, ignore
from ncprior.priors.tilted import NUMBERS_AT_ONCE, TiltedNormal, chunks

SMALLEST_Z = 1e-6


class LARSPrior(TiltedNormal):
    """p_T(z) = p(z) [a(z) (1 - alpha) / Z + alpha], alpha = (1 - Z)^(T - 1), Z = E_p[a].

    A proposal of the normal p is accepted with probability a(z); the T-th is always. The density
    is normalised as far as Z is known: `acceptance` estimates it, with error `acceptance_se`.

    Args:
        latent_size: d.
        truncation: T.
        estimate_draws: K, draws of the base behind each estimate of Z in training.
        hidden: Widths of the network behind a.
        activation: Its activation; see `TiltedNormal`.
        temperature: Factor of the base's standard deviation.

    To train it with a VAE, put it under the VAE and train that:
    `train_vae(FlatVAE(..., prior=LARSPrior(d)), data)`, then call `estimate_acceptance`. In
    training mode `log_prob` draws from torch's own generator, as dropout does, and moves
    `acceptance` along; the draw of the posterior is left out of the estimate there.

    Reference: Bauer and Mnih, "Resampled Priors for Variational Autoencoders" (AISTATS 2019,
    arXiv 1810.11428), section 3; the estimate of Z is that of the program of Lawson et al.
    """

    normalized = True
    acceptance: Tensor  # (), Z: a moving average in training
    acceptance_se: Tensor  # (), NaN until `estimate_acceptance`

    def __init__(
        self,
        latent_size: int,
        *,
        truncation: int = 100,
        estimate_draws: int = 1024,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(latent_size, hidden=hidden, activation=activation, temperature=temperature)
        if truncation < 1 or estimate_draws < 1:
            raise ValueError(
                "truncation and estimate_draws must be at least 1, "
                f"got {truncation=}, {estimate_draws=}"
            )
        self.truncation, self.estimate_draws = truncation, estimate_draws
        self.register_buffer("acceptance", torch.tensor(0.5))
        self.register_buffer("acceptance_se", torch.tensor(math.nan))

    @property
    def config(self) -> dict[str, Any]:
        own = {"truncation": self.truncation, "estimate_draws": self.estimate_draws}
        return super().config | own

    def log_tilt(self, z: Tensor) -> Tensor:
        """log p_T(z) - log p(z) in nats for z (..., d), (...), with the Z that is stored."""
        return self._log_tilt(F.logsigmoid(self.score(z)), self.acceptance)

    def log_prob(self, value: Tensor) -> Tensor:
        """log p_T(z) in nats of z (..., d), (...), normalised up to the error of `acceptance`.

        In training mode Z is a moving average whose gradient is that of the newest estimate.
        """
        if self.training and torch.is_grad_enabled():
            return self.training_log_prob(value)
        return self.base_log_prob(value) + self.log_tilt(value)

    def training_log_prob(
        self,
        value: Tensor,
        *,
        generator: Generator | None = None,
        posterior: Normal | None = None,
        decay: float = 0.99,
    ) -> Tensor:
        """log p_T with a fresh estimate of Z, which moves the stored one.

        Args:
            value: z (n, d).
            generator: Source of the draws of the base.
            posterior: What `value` was drawn from, row by row: its draws then count as one more
                draw of the base, weighted by p / q (only where no scale is zero).
            decay: Of the moving average of Z.
        """
        log_a = F.logsigmoid(self.score(value))
        base = self.base_sample((self.estimate_draws,), generator=generator)
        accepted, count = self.score(base).sigmoid().sum(), self.estimate_draws
        if posterior is not None:
            log_weight = self.base_log_prob(value) - posterior.log_prob(value)
            accepted, count = accepted + (log_a + log_weight).exp().mean(), count + 1
        newest = accepted / count
        with torch.no_grad():
            self.acceptance.lerp_(newest.to(self.acceptance), 1 - decay)
            self.acceptance.clamp_(SMALLEST_Z, 1 - SMALLEST_Z)
        z = self.acceptance.detach().clone() + newest - newest.detach()
        return self.base_log_prob(value) + self._log_tilt(log_a, z)

    @torch.no_grad()
    def estimate_acceptance(self, num: int = 1 << 20, *, generator: Generator) -> Self:
        """Store Z and its standard error from `num` draws of the base; return the prior.

        Bauer and Mnih take 10^10 draws; the relative error is that of a mean of a(z).
        """
        parts = [
            self.score(self.base_sample((count,), generator=generator)).sigmoid()
            for count in chunks(num, max(1, NUMBERS_AT_ONCE // self.latent_size))
        ]
        found = mean_and_se(torch.cat(parts))
        self.acceptance.fill_(found.value)
        self.acceptance.clamp_(SMALLEST_Z, 1 - SMALLEST_Z)
        self.acceptance_se.fill_(found.se)
        return self

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d): the first proposal accepted, or else the T-th."""
        num = math.prod(sample_shape)
        at_once = min(self.truncation, math.ceil(1.5 / float(self.acceptance)))
        draws = [self.loc.new_empty(0, self.latent_size)]
        for count in chunks(num, max(1, NUMBERS_AT_ONCE // (at_once * self.latent_size))):
            draws.append(self._reject(count, at_once, generator))
        return torch.cat(draws).view(*sample_shape, self.latent_size)

    def tempered(self, temperature: float) -> Self:
        """The same acceptance of a base whose standard deviation is times `temperature`.

        Its Z is another one, and is estimated here.
        """
        other = super().tempered(temperature)
        if other is self:
            return self
        other.acceptance, other.acceptance_se = self.acceptance.clone(), self.acceptance_se.clone()
        generator = stream(0, "Z at another temperature", device=self.loc.device)
        return other.estimate_acceptance(1 << 17, generator=generator)

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        truncation: int = 100,
        estimate_draws: int = 1024,
        hidden: Sequence[int] = (100, 100),
        activation: str = "tanh",
        matched: bool = True,
        steps: int = 4000,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.01,
        heldout: float = 0.1,
        patience: int = 10,
        acceptance_draws: int = 1 << 20,
        seed: int = 0,
        report: Report = ignore,
    ) -> "LARSPrior":
        """Fit to codes by maximum likelihood; the best held-out weights are kept.

        Args:
            codes: What the encoder says of the training images.
            truncation: T.
            estimate_draws: K.
            hidden: Widths of the network.
            activation: Its activation.
            matched: Give the base the codes' mean and spread; False leaves it N(0, I), as
                published.
            steps, batch_size, learning_rate, weight_decay, patience: See `descend`.
            heldout: Share of the codes that only decide when to stop.
            acceptance_draws: Draws of the base behind the Z that is stored.
            seed: Decides the weights, the batches and what is held out.
            report: See `descend`.

        Raises:
            ValueError: codes that cannot be fitted, or a setting out of range.
        """
        train, left = codes.checked().split(heldout, seed=seed)
        with first_weights(seed):
            prior = cls(
                codes.latent_size,
                truncation=truncation,
                estimate_draws=estimate_draws,
                hidden=hidden,
                activation=activation,
            )
        prior.to(codes.loc)
        if matched:
            prior.standardize(train)
        device, noisy = codes.loc.device, bool((codes.scale > 0).all())
        left_out = left.draw(
            max(2000, len(left.loc)), generator=stream(seed, "held-out draws", device=device)
        )

        def loss(generator: Generator) -> Tensor:
            rows = torch.randint(len(train.loc), (batch_size,), generator=generator, device=device)
            posterior = Normal(train.loc[rows], train.scale[rows])
            z = posterior.sample(generator=generator)
            given = posterior if noisy else None
            return -prior.training_log_prob(z, generator=generator, posterior=given).mean()

        def heldout_loss() -> float:
            average = prior.acceptance.clone()
            prior.estimate_acceptance(1 << 14, generator=stream(seed, "held-out Z", device=device))
            value = -float(prior.log_prob(left_out).mean())
            prior.acceptance.copy_(average)
            return value

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
        prior.requires_grad_(False)
        return prior.estimate_acceptance(
            acceptance_draws, generator=stream(seed, "Z", device=device)
        )

    def _log_tilt(self, log_a: Tensor, z: Tensor) -> Tensor:
        """log[a (1 - alpha) / Z + alpha] from log a (...) and Z ()."""
        if self.truncation == 1:
            return torch.zeros_like(log_a)
        log_alpha = (self.truncation - 1) * torch.log1p(-z)
        log_kept = torch.log(-torch.expm1(log_alpha)) - z.log()
        return torch.logaddexp(log_a + log_kept, log_alpha)

    def _reject(self, num: int, at_once: int, generator: Generator | None) -> Tensor:
        draws = self.loc.new_empty(num, self.latent_size)
        pending = torch.arange(num, device=self.loc.device)
        left = self.truncation
        while len(pending):
            at_once = min(at_once, left)
            z = self.base_sample((len(pending), at_once), generator=generator)
            a = self.score(z).sigmoid()
            uniform = torch.rand(a.shape, generator=generator, device=a.device, dtype=a.dtype)
            accepted = uniform < a
            left -= at_once
            if not left:
                accepted[:, -1] = True
            first = accepted.to(torch.uint8).argmax(1)  # of several ones argmax takes the first
            done = accepted.any(1)
            draws[pending[done]] = z[done, first[done]]
            pending = pending[~done]
        return draws
