"""Densities over latents."""

from ncprior.normal import StandardNormal
from ncprior.priors.contrastive import NoiseContrastivePrior
from ncprior.priors.mixture import GaussianMixture

__all__ = ["GaussianMixture", "NoiseContrastivePrior", "StandardNormal"]
