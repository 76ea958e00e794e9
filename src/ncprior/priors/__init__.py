"""Densities over latents."""

from ncprior.normal import StandardNormal
from ncprior.priors.autoregressive import AutoregressivePrior
from ncprior.priors.codes import Codes
from ncprior.priors.contrastive import NoiseContrastivePrior
from ncprior.priors.diffusion import DiffusionPrior
from ncprior.priors.energy import EnergyPrior
from ncprior.priors.flow import FlowPrior
from ncprior.priors.lars import LARSPrior
from ncprior.priors.mixture import GaussianMixture
from ncprior.priors.named import PRIORS, fit_density, parse_name
from ncprior.priors.pretrained import load_density, save_density
from ncprior.priors.snis import SNISPrior
from ncprior.priors.two_stage import TwoStagePrior
from ncprior.priors.vamp import PseudoInputs, VampPrior

__all__ = [
    "PRIORS",
    "AutoregressivePrior",
    "Codes",
    "DiffusionPrior",
    "EnergyPrior",
    "FlowPrior",
    "GaussianMixture",
    "LARSPrior",
    "NoiseContrastivePrior",
    "PseudoInputs",
    "SNISPrior",
    "StandardNormal",
    "TwoStagePrior",
    "VampPrior",
    "fit_density",
    "load_density",
    "parse_name",
    "save_density",
]
