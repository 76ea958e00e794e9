"""A Gaussian mixture as prior."""

import math
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Generator, Tensor, nn

from ncprior.numerics import stream
from ncprior.priors.codes import Codes
from ncprior.priors.expectation import (
    Parts,
    clusters,
    expectation_maximisation,
    inverse,
    log_densities,
    rows_of,
)
from ncprior.priors.fitting import Report, ignore

AUTO = "auto"
SIZES = (10, 30, 100)
"""Numbers of components that "auto" tries in turn."""
HELDOUT = 0.1
"""Share of the codes that it judges them by."""


class GaussianMixture(nn.Module):
    """sum_j w_j N(mean_j, L_j L_j^T) over latents of size d, with full covariances.

    Args:
        components: Number of components m.
        latent_size: d.

    RAE (Ghosh et al. 2020) fits 10 components on the codes of an autoencoder.
    """

    normalized = True
    log_weights: Tensor  # (m,)
    means: Tensor  # (m, d)
    cholesky: Tensor  # (m, d, d), lower
    precision: Tensor  # (m, d, d), inverse of `cholesky`, upper after transposition

    def __init__(self, components: int, latent_size: int) -> None:
        super().__init__()
        eye = torch.eye(latent_size).repeat(components, 1, 1)
        weights = torch.full((components,), -math.log(components))
        self.register_buffer("log_weights", weights)
        self.register_buffer("means", torch.zeros(components, latent_size))
        self.register_buffer("cholesky", eye)
        self.register_buffer("precision", eye.clone())

    @property
    def config(self) -> dict[str, Any]:
        return {"components": len(self.means), "latent_size": self.means.shape[1]}

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.means.shape[1:])

    @classmethod
    def fit(
        cls,
        codes: Codes | Tensor,
        components: int | str = 10,
        *,
        seed: int = 0,
        report: Report = ignore,
        max_iter: int = 2000,
        tol: float = 1e-3,
    ) -> Self:
        """Fit by expectation maximisation over posteriors, with full covariances.

        Args:
            codes: What the encoder says of the images, or points (n, d).
            components: Number of components m; "auto" to try 10, 30 and 100 in turn for as long as
                a tenth of the codes, which is held out, becomes more likely. The best is then
                fitted further, to all codes.
            seed: Decides the first guess and what is held out.
            report: Receives the bound that is raised, in nats, once for each number of components;
                see `expectation`.
            max_iter: Iterations at most.
            tol: Gain in the mean log-likelihood below which it ends.

        Raises:
            ValueError: fewer codes than components, or codes that are not finite.
        """
        if not isinstance(codes, Codes):
            codes = Codes(codes, torch.zeros_like(codes))
        codes = codes.checked()
        options: Any = {"report": report, "max_iter": max_iter, "tol": tol}
        if components == AUTO:
            return cls._fit_best(codes, seed, options)
        if not isinstance(components, int) or components < 1:
            raise ValueError(
                f"components must be a whole number of at least 1, or auto, got {components!r}"
            )
        if len(codes.loc) < components:
            raise ValueError(
                f"codes must be at least {components}, one for each component, got "
                f"{len(codes.loc)}; use fewer components or more data"
            )
        return cls._from(codes, clusters(codes, components, seed=seed), **options)

    @classmethod
    def _from(cls, codes: Codes, start: Parts, *, report: Report, **options: Any) -> Self:
        """The mixture that expectation maximisation comes to from there."""
        parts, iterations, bound = expectation_maximisation(codes, start, **options)
        report(iterations, {"log_prob": bound})
        mixture = cls(len(parts.means), codes.latent_size).to(codes.loc.device)
        mixture.set(*parts)
        return mixture

    @classmethod
    def _fit_best(cls, codes: Codes, seed: int, options: dict[str, Any]) -> Self:
        """The mixture of the number of components that held-out codes are most likely under."""
        rest, held = codes.split(HELDOUT, seed=seed)
        z = held.each(generator=stream(seed, "mixture sizes", 0, held.loc.device))
        best, likeliest = None, -math.inf
        for size in SIZES:
            if best is not None and size > len(rest.loc):
                break
            mixture = cls.fit(rest, size, seed=seed, **options)
            likelihood = float(mixture.log_prob(z).mean())
            if best is not None and not likelihood > likeliest:
                break
            best, likeliest = mixture, likelihood
        assert best is not None
        return cls._from(codes, best.parts, **options)

    @property
    def parts(self) -> Parts:
        return Parts(self.log_weights, self.means, self.cholesky)

    def set(self, log_weights: Tensor, means: Tensor, cholesky: Tensor) -> None:
        """Put in weights (m,), means (m, d) and Cholesky factors (m, d, d)."""
        self.log_weights.copy_(log_weights)
        self.means.copy_(means)
        self.cholesky.copy_(cholesky)
        self.precision.copy_(inverse(cholesky))

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...)."""
        flat = value.reshape(-1, value.shape[-1])
        parts = flat.split(rows_of(len(self.means)))
        each = [log_densities(part, self.parts, self.precision).logsumexp(1) for part in parts]
        return torch.cat(each).view(value.shape[:-1])

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        num, size = math.prod(sample_shape), self.means.shape[1]
        options: Any = {"device": self.means.device, "dtype": self.means.dtype}
        picks = pick_components(self.log_weights, num, generator)
        noise = torch.randn((num, size), generator=generator, **options)
        draws = torch.empty((num, size), **options)
        for j in picks.unique().tolist():
            rows = (picks == j).nonzero().squeeze(1)
            draws[rows] = torch.addmm(self.means[j], noise[rows], self.cholesky[j].T)
        return draws.view(*sample_shape, size)

    def tempered(self, temperature: float) -> "GaussianMixture":
        """The same means and weights, each component's standard deviation times `temperature`."""
        if temperature == 1:
            return self
        other = GaussianMixture(*self.means.shape).to(self.means)
        other.set(self.log_weights, self.means, self.cholesky * temperature)
        return other


def pick_components(log_weights: Tensor, num: int, generator: Generator | None) -> Tensor:
    """Indices (num,) of components, drawn by their weights exp(log_weights) (m,)."""
    edges = log_weights.exp().cumsum(0)
    uniform = torch.rand(num, generator=generator, device=edges.device) * edges[-1]
    return torch.searchsorted(edges, uniform.to(edges.dtype)).clamp_max(len(edges) - 1)
