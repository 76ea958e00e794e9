"""Measures: pure functions of arrays."""

from ncprior.metrics.features import Features, default_features, load_features, pca, pixels
from ncprior.metrics.frechet import (
    Frechet,
    frechet_distance,
    frechet_estimates,
    moment_blocks,
)
from ncprior.metrics.kernel import kid, mean_of_terms, median_bandwidth, mmd, mmd_terms
from ncprior.metrics.likelihood import base_log_ratios, importance_weighted_bounds
from ncprior.metrics.modes import compare_modes
from ncprior.metrics.neighbours import memorised, nearest
from ncprior.metrics.precision_recall import prdc

__all__ = [
    "Features",
    "Frechet",
    "base_log_ratios",
    "compare_modes",
    "default_features",
    "frechet_distance",
    "frechet_estimates",
    "importance_weighted_bounds",
    "kid",
    "load_features",
    "mean_of_terms",
    "median_bandwidth",
    "memorised",
    "mmd",
    "mmd_terms",
    "moment_blocks",
    "nearest",
    "pca",
    "pixels",
    "prdc",
]
