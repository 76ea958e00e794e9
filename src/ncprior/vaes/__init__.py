"""VAEs that offer the walk."""

from ncprior.vaes.build import PRESETS, build_vae
from ncprior.vaes.check import check_vae
from ncprior.vaes.flat import FlatVAE
from ncprior.vaes.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Gaussian,
    PixelNormal,
)
from ncprior.vaes.nvae import NVAE

__all__ = [
    "NVAE",
    "PRESETS",
    "Bernoulli",
    "Categorical",
    "DiscretizedLogisticMixture",
    "FlatVAE",
    "Gaussian",
    "PixelNormal",
    "build_vae",
    "check_vae",
]
