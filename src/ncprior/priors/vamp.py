"""VampPrior: the mixture of posteriors of pseudo-inputs, learnt after or with the VAE."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ncprior.normal import LOG_2_PI
from ncprior.numerics import stream
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, descend, ignore
from ncprior.priors.mixture import pick_components
from ncprior.walk import Repeated


class Components(NamedTuple):
    """sum_k w_k N(mean_k, diag(scale_k^2)) over latents of size d."""

    log_weights: Tensor  # (K,)
    means: Tensor  # (K, d)
    scales: Tensor  # (K, d)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...).

        The squares are multiplied out, so that nothing of size (n, K, d) is ever held; in float64,
        since posteriors far narrower than their distances would cancel in float32.
        """
        z, means, scales = value.double(), self.means.double(), self.scales.double()
        precision = scales.square().reciprocal()  # (K, d)
        pull = means * precision
        distance = z.square() @ precision.T - 2 * z @ pull.T + (means * pull).sum(1)  # (..., K)
        constant = self.log_weights.double() - scales.log().sum(1)
        each = constant - 0.5 * (distance + LOG_2_PI * means.shape[1])
        return each.logsumexp(-1).to(value.dtype)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        num, means = math.prod(sample_shape), self.means
        picks = pick_components(self.log_weights, num, generator)
        shape = (num, means.shape[1])
        noise = torch.randn(shape, generator=generator, device=means.device, dtype=means.dtype)
        draws = torch.addcmul(means[picks], noise, self.scales[picks])
        return draws.view(*sample_shape, means.shape[1])

    def tempered(self, temperature: float) -> "Components":
        """The same means and weights, each component's standard deviation times `temperature`."""
        return Components(self.log_weights, self.means, self.scales * temperature)


class VampPrior(nn.Module):
    """sum_k w_k q(z | u_k), kept as K diagonal normals, so that it needs no encoder.

    Args:
        components: Number of pseudo-inputs K.
        latent_size: d.

    Reference: Tomczak and Welling (AISTATS 2018), Eq. 9. Published: K = 500, uniform weights,
    learnt with the VAE, as `PseudoInputs` does; `fit` learns them for a VAE that stays as it is.
    """

    normalized = True
    log_weights: Tensor
    means: Tensor
    scales: Tensor

    def __init__(self, components: int, latent_size: int) -> None:
        super().__init__()
        weights = torch.full((components,), -math.log(components))
        self.register_buffer("log_weights", weights)
        self.register_buffer("means", torch.zeros(components, latent_size))
        self.register_buffer("scales", torch.ones(components, latent_size))

    @property
    def config(self) -> dict[str, Any]:
        return {"components": len(self.means), "latent_size": self.means.shape[1]}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    @property
    def parts(self) -> Components:
        return Components(self.log_weights, self.means, self.scales)

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...)."""
        return self.parts.log_prob(value)

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        return self.parts.sample(sample_shape, generator=generator)

    def tempered(self, temperature: float) -> "VampPrior":
        """The same means and weights, each component's standard deviation times `temperature`."""
        if temperature == 1:
            return self
        return self.of(self.parts.tempered(temperature))

    @classmethod
    def of(cls, parts: Components) -> "VampPrior":
        """A prior that holds these components, without gradient."""
        prior = cls(*parts.means.shape).to(parts.means)
        for own, value in zip(prior.parts, parts, strict=True):
            own.copy_(value.detach())
        return prior.eval()

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        vae: Any,
        images: Tensor,
        components: int = 500,
        weighted: bool = False,
        steps: int = 500,
        batch_size: int = 512,
        learning_rate: float = 0.01,
        heldout: float = 0.1,
        seed: int = 0,
        report: Report = ignore,
    ) -> "VampPrior":
        """Learn pseudo-inputs by E_q[log p(z)], the gradient going through the frozen encoder.

        Args:
            codes: What the encoder says of the training images.
            vae: The VAE; it is copied, not changed.
            images: Images (n, c, h, w) in [0, 1]; pseudo-inputs start at some of them.
            components: Number of pseudo-inputs K.
            weighted: Learn weights as well; they are uniform otherwise, as published.
            steps: Steps at most.
            batch_size: Draws of q(z) a step.
            learning_rate: In units of a pixel's range, since steps are Adam's. Three times as fast
                wins likelihood on some VAEs, while pseudo-inputs leave the images and samples get
                worse.
            heldout: Share of the images on which the best pseudo-inputs are chosen.
            seed: Decides the start, the split, the batches and the noise.
            report: Receives the held-out loss, minus the mean log-density in nats.

        Raises:
            ValueError: see `PseudoInputs`; no `vae` or codes that cannot be fitted.
        """
        if vae is None or images is None:
            raise ValueError("vamp needs the VAE and images to start from; pass vae= and images=")
        rest, held = codes.checked().split(heldout, seed=seed)
        frozen = copy.deepcopy(vae).requires_grad_(False).eval()
        inputs = PseudoInputs(
            frozen.encode,
            images.to(codes.loc),
            components=components,
            weighted=weighted,
            seed=seed,
        )
        draws = held.each(generator=stream(seed, "held-out draws", device=codes.loc.device))
        descend(
            inputs,
            lambda generator: -inputs.log_prob(rest.draw(batch_size, generator=generator)).mean(),
            lambda: -float(inputs.log_prob(draws).mean()),
            steps=steps,
            learning_rate=learning_rate,
            evaluate_every=50,
            patience=5,
            seed=seed,
            report=report,
        )
        return inputs.frozen()


class PseudoInputs(nn.Module):
    """A VampPrior whose pseudo-inputs are parameters: the prior of a VAE while it trains.

        vae.prior = PseudoInputs(vae.encode, images)
        train_vae(vae, data)
        vae = vae.with_prior(vae.prior.frozen())

    Args:
        encode: Images (K, c, h, w) to the posteriors' means and scales, each (K, d).
        images: Images (n, c, h, w) in [0, 1] with n of at least K; K of them are the start.
        components: Number of pseudo-inputs K.
        weighted: Learn weights as well.
        seed: Decides which images, and their noise.
        noise: Standard deviation of the noise added to these images, as published.

    Pseudo-inputs are put back into [0, 1] after each step, where the published program clips them:
    a clipped pixel has no gradient and never returns.

    Raises:
        ValueError: fewer images than components, or images outside [0, 1].
    """

    normalized = True

    def __init__(
        self,
        encode: Callable[[Tensor], tuple[Tensor, ...]],
        images: Tensor,
        *,
        components: int = 500,
        weighted: bool = False,
        seed: int = 0,
        noise: float = 0.01,
    ) -> None:
        super().__init__()
        if images.ndim != 4 or len(images) < components or components < 1:
            raise ValueError(
                f"images must be (n, c, h, w) with n of at least components = {components}, "
                f"got {tuple(images.shape)}"
            )
        generator = stream(seed, "pseudo-inputs")
        rows = torch.randperm(len(images), generator=generator)[:components]
        start = images[rows.to(images.device)]
        if not (start >= 0).all() or not (start <= 1).all():
            raise ValueError("images must be floats in [0, 1]; divide bytes by 255")
        added = noise * torch.randn(start.shape, generator=generator, dtype=start.dtype)
        self.inputs = nn.Parameter((start + added.to(start.device)).clamp(0, 1))
        logits = torch.zeros(components, device=start.device, dtype=start.dtype)
        self.logits = nn.Parameter(logits, requires_grad=weighted)
        self.encode = encode  # of a VAE, which is no part of this module

    @property
    def parts(self) -> Components:
        """The mixture that the encoder makes of the pseudo-inputs now, with gradients."""
        if self.training:
            with torch.no_grad():
                self.inputs.clamp_(0, 1)
        means, scales = self.encode(self.inputs.clamp(0, 1) if not self.training else self.inputs)
        return Components(self.logits.log_softmax(0), means, scales)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        with torch.no_grad():
            return tuple(self.encode(self.inputs[:1])[0].shape[1:])

    def rows(self, num: int) -> Repeated:
        """The same density for each of `num` rows; pseudo-inputs are encoded once."""
        return Repeated(self.parts, num)

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...)."""
        return self.parts.log_prob(value)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        return self.parts.sample(sample_shape, generator=generator)

    def tempered(self, temperature: float) -> VampPrior:
        """What `frozen` returns, at that temperature."""
        return self.frozen().tempered(temperature)

    @torch.no_grad()
    def frozen(self) -> VampPrior:
        """The prior as it is now, without the encoder."""
        mode = self.training
        parts = self.eval().parts
        self.train(mode)
        return VampPrior.of(parts)
