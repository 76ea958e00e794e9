"""Let callers pass plain tensors and arrays where images are wanted."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .dataset import ImageDataset
from .splits import Splits, check_splits, random_splits


def as_dataset(images: ImageDataset | Tensor | np.ndarray) -> ImageDataset:
    """Images (n, c, h, w) in [0, 1], or bytes, as an `ImageDataset`."""
    if isinstance(images, ImageDataset):
        return images
    if not isinstance(images, Tensor | np.ndarray):
        raise TypeError(
            "images must be an ncprior.ImageDataset, or a tensor or array (n, c, h, w), got a "
            f"{type(images).__name__}; gather what a loader gives with torch.cat"
        )
    tensor = torch.as_tensor(images)
    if tensor.dtype != torch.uint8:
        tensor = tensor.float()
    return ImageDataset(tensor.cpu())


def as_data(
    images: ImageDataset | Tensor | np.ndarray, splits: Splits | None = None, seed: int = 0
) -> tuple[ImageDataset, Splits]:
    """Images and their splits; without any, 80/10/10 at random by `seed`."""
    data = as_dataset(images)
    splits = random_splits(len(data), 0.1, 0.1, seed) if splits is None else splits
    check_splits(splits, len(data))
    return data, splits
