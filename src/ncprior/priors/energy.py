"""A latent energy-based prior, learned and sampled by short-run Langevin dynamics."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ncprior.numerics import stream
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, descend, first_weights, ignore
from ncprior.priors.tilted import TiltedNormal, chunks
from ncprior.walk import Repeated

ROWS_AT_ONCE = 4096


class EnergyPrior(TiltedNormal):
    """exp(-E(z)) p(z) / Z over a normal base p, E a leaky perceptron.

    `sample` runs the dynamics that it was learned with, from draws of the base and for as many
    steps: what it draws is the law of that short run, which learning has fitted to the codes. It
    is not the density exp(-E) p / Z of `unnormalized_log_prob`, which the run has no time to reach.

    To train it with a VAE, put it under the VAE and train that:
    `train_vae(FlatVAE(..., prior=EnergyPrior(d)), data)`. Posteriors stay those of the encoder,
    where Pang et al. have a second Langevin run. The energy then learns at a twentieth of the VAE's
    rate (theirs: a fifth): at the same rate energy and encoder chase each other to infinity, which
    short runs cannot follow.

    Args:
        latent_size: d.
        langevin_steps: Steps of the run.
        step_size: s in z <- z - (s^2 / 2) grad[E(z) - log p(z)] + s noise, in units of the base.
        hidden: Widths of the perceptron.
        temperature: Factor of the base's standard deviation.

    Reference: Pang et al., "Learning Latent Space Energy-Based Prior Model" (NeurIPS 2020,
    arXiv 2006.08205), section 2 and its program; Appendix A of Aneja et al. (NeurIPS 2021).
    """

    normalized = False
    slow_draws = True
    learning_rate_share = 0.05

    def __init__(
        self,
        latent_size: int,
        *,
        langevin_steps: int = 60,
        step_size: float = 0.4,
        hidden: Sequence[int] = (200, 200),
        temperature: float = 1.0,
    ) -> None:
        super().__init__(
            latent_size, hidden=hidden, activation="leaky_relu", temperature=temperature
        )
        if langevin_steps < 1 or not step_size > 0:
            raise ValueError(
                "langevin_steps must be at least 1 and step_size positive, "
                f"got {langevin_steps=}, {step_size=}"
            )
        self.langevin_steps, self.step_size = langevin_steps, step_size

    @property
    def config(self) -> dict[str, Any]:
        own = {"langevin_steps": self.langevin_steps, "step_size": self.step_size}
        return {k: v for k, v in super().config.items() if k != "activation"} | own

    def energy(self, z: Tensor) -> Tensor:
        """E(z) in nats for z (..., d), (...)."""
        return self.score(z)

    def log_tilt(self, z: Tensor) -> Tensor:
        return -self.energy(z)

    def unnormalized_log_prob(self, value: Tensor) -> Tensor:
        """log p(z) - E(z) in nats of z (..., d), (...)."""
        return self.base_log_prob(value) - self.energy(value)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Ends of short runs of Langevin dynamics that start in the base, (*sample_shape, d)."""
        num = math.prod(sample_shape)
        runs = [self._short_run(count, generator) for count in chunks(num, ROWS_AT_ONCE)]
        x = torch.cat([self.loc.new_empty(0, self.latent_size), *runs])
        return self.outer(x).view(*sample_shape, self.latent_size)

    def rows(self, num: int) -> "LearningRows":
        """The density for each of `num` rows of a walk, for training a VAE with it."""
        return LearningRows(self, num)

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        langevin_steps: int = 60,
        step_size: float = 0.4,
        hidden: Sequence[int] = (200, 200),
        matched: bool = True,
        steps: int = 1000,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.0,
        average: float = 0.99,
        heldout: float = 0.1,
        patience: int = 10,
        seed: int = 0,
        report: Report = ignore,
    ) -> "EnergyPrior":
        """Fit to codes by the gradient E_q[grad E] - E_short-run[grad E].

        The difference of energies is no loss: the weights kept, of a moving average, are those
        whose short runs have the smallest energy distance (Szekely and Rizzo) to held-out codes.

        Args:
            codes: What the encoder says of the training images.
            langevin_steps: Steps of the dynamics.
            step_size: Their size s.
            hidden: Widths of the perceptron.
            matched: Give the base the codes' mean and spread; False leaves it N(0, I), as
                published.
            steps, batch_size, learning_rate, weight_decay, average, patience: See `descend`.
            heldout: Share of the codes that only decide which weights are kept.
            seed: Decides the weights, the batches and what is held out.
            report: See `descend`.

        Raises:
            ValueError: codes that cannot be fitted, or a setting out of range.
        """
        train, left = codes.checked().split(heldout, seed=seed)
        with first_weights(seed):
            prior = cls(
                codes.latent_size,
                langevin_steps=langevin_steps,
                step_size=step_size,
                hidden=hidden,
            )
        prior.to(codes.loc)
        if matched:
            prior.standardize(train)
        device, num = codes.loc.device, 1000
        left_out = prior.inner(
            left.draw(num, generator=stream(seed, "held-out draws", device=device))
        )

        def loss(generator: Generator) -> Tensor:
            x = prior.inner(train.draw(batch_size, generator=generator))
            with torch.no_grad():
                run = prior._short_run(batch_size, generator)
            energies = prior.network(torch.cat([x, run])).squeeze(-1)
            return energies[:batch_size].mean() - energies[batch_size:].mean()

        @torch.no_grad()
        def heldout_loss() -> float:
            run = prior._short_run(num, stream(seed, "held-out runs", device=device))
            return energy_distance(run, left_out)

        descend(
            prior,
            loss,
            heldout_loss,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clip_norm=1.0,
            patience=patience,
            seed=seed,
            report=report,
            average=average,
        )
        return prior.requires_grad_(False)

    def _short_run(self, num: int, generator: Generator | None) -> Tensor:
        """Ends of runs in the inner coordinate, (num, d)."""
        options: Any = {"device": self.loc.device, "dtype": self.loc.dtype}
        shape, s = (num, self.latent_size), self.step_size
        x = self.temperature * torch.randn(shape, generator=generator, **options)
        for _ in range(self.langevin_steps):
            slope = self._slope(x) + x / self.temperature**2
            noise = torch.randn(shape, generator=generator, **options)
            x = x - 0.5 * s**2 * slope + s * noise
        return x

    def _slope(self, x: Tensor) -> Tensor:
        """Gradient of the energy by x (n, d), by hand: autograd would take twice as long."""
        *hidden, out = (layer for layer in self.network if isinstance(layer, nn.Linear))
        slopes = []
        for layer in hidden:
            x = layer(x)
            slopes.append(torch.where(x > 0, 1.0, 0.2).to(x))
            x = x * slopes[-1]
        gradient = out.weight.expand(len(x), -1)
        for layer, slope in zip(reversed(hidden), reversed(slopes), strict=True):
            gradient = (gradient * slope) @ layer.weight
        return gradient


class LearningRows(Repeated):
    """An energy-based prior for each row; its `log_prob` is what a VAE learns from."""

    def log_prob(self, value: Tensor) -> Tensor:
        """log p(z) - E(z) - log Z in nats of z (..., d), (...).

        In training minus log Z is the mean energy of short runs, drawn from torch's own generator
        as dropout is: its gradient is right as far as these are draws of the density, its value is
        log Z's bound without the runs' entropy. Otherwise Z comes from fixed draws of the base.
        """
        prior = self.density
        unnormalized = prior.unnormalized_log_prob(value)
        if prior.training and torch.is_grad_enabled():
            runs = prior.sample((self.num,))
            return unnormalized + prior.energy(runs).mean()
        generator = stream(0, "draws of the base", device=value.device)
        return unnormalized - prior.estimate_log_z(1 << 14, generator=generator).value


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| of draws (n, d) and (m, d), without bias."""

    def within(z: Tensor) -> Tensor:
        return torch.cdist(z, z).sum() / (len(z) * (len(z) - 1))

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))
