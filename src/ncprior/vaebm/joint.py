"""The density of a VAE with an energy on its images, in the noise that images are made of.

p(x, z) is proportional to p(x | z) p(z) exp(-E(x)). With x = mu(z) + sigma(z) eps_x, and
z_k = mu_k + sigma_k eps_k in each group whose prior is normal, the noise has the density

    log p(eps) = -|eps_x|^2 / 2 - sum_k |eps_k|^2 / 2 + sum_k log r_k(z_k) - E(x) + constant

in which all coordinates have one scale, whatever sigma is. A group whose prior is not normal has z
itself as the coordinate and log p(z) in place of -|eps_k|^2 / 2. The ratios are those of a noise
contrastive prior; over several groups they make its globally normalised density.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ncprior.normal import Normal
from ncprior.priors import NoiseContrastivePrior
from ncprior.vaes.likelihoods import GaussianEmission, PixelNormalEmission
from ncprior.walk import Group, device_of, from_list, from_prior, walk


class Joint:
    """The joint density of a frozen VAE and a prior, less the energy, over rows of noise (n, size).

    Args:
        vae: Any VAE that offers the walk.
        prior: A noise contrastive prior on it; None for the VAE's own.
        pixel_noise: Whether images are mu(z) + sigma eps_x, which needs a Gaussian decoder. Without
            it the image is the likelihood's mean, whatever the likelihood, and z alone moves: then
            the model is a prior p(z) r(z) exp(-E(mean(z))), and the decoder's noise stays as it is.

    Raises:
        ValueError: pixel noise with a decoder that is not Gaussian, or a prior for another VAE.

    Reference: Xiao et al., "VAEBM" (ICLR 2021, arXiv 2010.00654), section 3.2.
    """

    def __init__(
        self, vae: Any, prior: NoiseContrastivePrior | None = None, *, pixel_noise: bool = True
    ) -> None:
        self.vae = vae if prior is None else prior.under(vae)
        self.prior, self.pixel_noise = prior, pixel_noise
        self.plain = prior is None  # whether the noise is N(0, I)
        shapes: list[tuple[int, ...]] = []

        def choose(_: int, group: Group) -> Tensor:
            shapes.append(tuple(group.prior.event_shape))
            self.plain = self.plain and isinstance(group.prior, Normal)
            return group.prior.sample(generator=generator)

        generator = Generator(device_of(self.vae)).manual_seed(0)
        with torch.no_grad():
            state = walk(self.vae, choose, 1).state
            mean = self.vae.emit(state).mean
        self.dtype = mean.dtype
        self.latent_sizes = [math.prod(shape) for shape in shapes]
        self.image_shape = tuple(mean.shape[1:])
        if pixel_noise:
            _check_emission(self.vae.emit(state))
        self.num_pixels = mean.numel() if pixel_noise else 0
        self.size = sum(self.latent_sizes) + self.num_pixels

    def decode(self, noise: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images (n, c, h, w), log-density of the noise without the energy (n,), and latents.

        The log-density is in nats, up to a constant; images may stick out of [0, 1] with pixel
        noise. All are differentiable in the noise (n, size).
        """
        *parts, pixels = noise.split([*self.latent_sizes, self.num_pixels], 1)
        log_p = -0.5 * pixels.square().sum(1)

        def choose(k: int, group: Group) -> Tensor:
            nonlocal log_p
            part = parts[k].unflatten(1, group.prior.event_shape)
            if isinstance(group.prior, Normal):
                z = group.prior.loc + group.prior.scale * part
                log_p = log_p - 0.5 * part.flatten(1).square().sum(1)
            else:
                z = part
                log_p = log_p + _log_prob(group.prior, z)
            if self.prior is not None and k in self.prior.fitted_groups:
                log_p = log_p + self.prior.log_ratio(k, z, group)
            return z

        walked = walk(self.vae, choose, len(noise))
        emission = self.vae.emit(walked.state)
        if not self.pixel_noise:
            return emission.mean, log_p, walked.latents
        pixels = pixels.unflatten(1, self.image_shape)
        return _check_emission(emission)(pixels), log_p, walked.latents

    def log_density(self, energy: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A function from noise (n, size) to log p(noise) in nats up to a constant, (n,)."""

        def log_density(noise: Tensor) -> Tensor:
            images, log_p, _ = self.decode(noise)
            return log_p - energy(images)

        return log_density

    @torch.no_grad()
    def latent_noise(self, latents: Sequence[Tensor]) -> Tensor:
        """The coordinates of latents z_k (n, *event), (n, size - pixels)."""
        parts: list[Tensor] = []

        def choose(k: int, group: Group) -> Tensor:
            z = latents[k]
            rows: Any = group.prior
            part = (z - rows.loc) / rows.scale if isinstance(rows, Normal) else z
            parts.append(part.flatten(1))
            return z

        walk(self.vae, choose, len(latents[0]))
        return torch.cat(parts, 1)

    def check_gradient(self) -> None:
        """Raise ValueError for a prior whose log-density Langevin dynamics cannot follow."""
        generator = Generator(device_of(self.vae)).manual_seed(0)
        with torch.no_grad():
            latents = walk(self.vae, from_prior(generator), 1).latents
        for k, z in enumerate(latents):
            latents[k] = z.clone().requires_grad_()
        with torch.enable_grad():
            found: list[Tensor] = []

            def choose(k: int, group: Group) -> Tensor:
                found.append(_log_prob(group.prior, latents[k]))
                return from_list(latents)(k, group)

            walk(self.vae, choose, 1)
        if not all(log_p.requires_grad for log_p in found):
            raise ValueError(
                "prior must have a log-density with a gradient in z for Langevin dynamics, and "
                "this one has none"
            )


def _log_prob(rows: Any, z: Tensor) -> Tensor:
    """The log-density of rows (n, *event) up to a constant, as cheaply as they know it."""
    inner = getattr(rows, "density", None)
    unnormalized = getattr(inner, "unnormalized_log_prob", None)
    return rows.log_prob(z) if unnormalized is None else unnormalized(z)


def _check_emission(emission: Any) -> Callable[[Tensor], Tensor]:
    """The function from noise (n, c, h, w) to images, of a Gaussian emission."""
    if isinstance(emission, GaussianEmission):
        return lambda noise: emission.mean + emission.scale * noise
    if isinstance(emission, PixelNormalEmission):
        normal = emission.normal
        return lambda noise: 0.5 * (normal.loc + normal.scale * noise) + 0.5
    raise ValueError(
        "pixel_noise needs a decoder whose images are a mean plus Gaussian noise, got "
        f"{type(emission).__name__}; with pixel_noise = False the energy is one of the decoder's "
        "mean images"
    )
