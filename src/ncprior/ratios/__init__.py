"""Estimates of log r(z) = log q(z) / p(z)."""

from typing import Any

from ncprior.ratios.combined import CombinedRatio
from ncprior.ratios.convolutional import ConvRatio
from ncprior.ratios.flat import MLPRatio, ResidualRatio
from ncprior.ratios.matched import MatchedRatio
from ncprior.ratios.nce import calibrate, jsd, nce_loss
from ncprior.ratios.network import RatioNetwork
from ncprior.ratios.reencoded import ReencodedRatio
from ncprior.ratios.stacking import join, split
from ncprior.ratios.summed import SummedRatio
from ncprior.ratios.unit import UnitRatio

NETWORKS: dict[str, Any] = {"mlp": MLPRatio, "residual": ResidualRatio, "conv": ConvRatio}

__all__ = [
    "NETWORKS",
    "CombinedRatio",
    "ConvRatio",
    "MLPRatio",
    "MatchedRatio",
    "RatioNetwork",
    "ReencodedRatio",
    "ResidualRatio",
    "SummedRatio",
    "UnitRatio",
    "calibrate",
    "join",
    "jsd",
    "nce_loss",
    "split",
]
