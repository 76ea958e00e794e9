"""VAEs that offer the walk."""

from ncprior.vaes.build import PRESETS, build_vae
from ncprior.vaes.flat import FlatVAE
from ncprior.vaes.likelihoods import Bernoulli, Categorical, Gaussian

__all__ = ["PRESETS", "Bernoulli", "Categorical", "FlatVAE", "Gaussian", "build_vae"]
