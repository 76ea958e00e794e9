"""Measures: pure functions of arrays."""

from ncprior.metrics.features import Features, default_features, pca, pixels
from ncprior.metrics.frechet import frechet_distance, moment_blocks
from ncprior.metrics.kernel import mean_of_terms, median_bandwidth, mmd, mmd_terms
from ncprior.metrics.likelihood import base_log_ratios, importance_weighted_bounds

__all__ = [
    "Features",
    "base_log_ratios",
    "default_features",
    "frechet_distance",
    "importance_weighted_bounds",
    "mean_of_terms",
    "median_bandwidth",
    "mmd",
    "mmd_terms",
    "moment_blocks",
    "pca",
    "pixels",
]
