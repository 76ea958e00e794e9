"""Images for training and measuring: where they come from, and how they are read."""

from .coerce import as_data, as_dataset
from .dataset import ImageDataset
from .load import SOURCES, load_data
from .splits import Splits, check_splits, fixed_splits, random_splits

__all__ = [
    "SOURCES",
    "ImageDataset",
    "Splits",
    "as_data",
    "as_dataset",
    "check_splits",
    "fixed_splits",
    "load_data",
    "random_splits",
]
