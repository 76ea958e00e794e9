"""Estimates of log r(z) = log q(z) / p(z)."""

from ncprior.ratios.nce import calibrate, jsd, nce_loss
from ncprior.ratios.networks import NETWORKS, MLPRatio, RatioNetwork, ResidualRatio

__all__ = [
    "NETWORKS",
    "MLPRatio",
    "RatioNetwork",
    "ResidualRatio",
    "calibrate",
    "jsd",
    "nce_loss",
]
