"""Measures: pure functions of arrays."""

from ncprior.metrics.features import Features, default_features, pca, pixels
from ncprior.metrics.frechet import frechet_distance, moment_blocks
from ncprior.metrics.likelihood import importance_weighted_bounds

__all__ = [
    "Features",
    "default_features",
    "frechet_distance",
    "importance_weighted_bounds",
    "moment_blocks",
    "pca",
    "pixels",
]
