"""Feature spaces for distances between sets of images, each with a name to go by."""

from typing import NamedTuple

import torch
from torch import Tensor

PIXELS_UP_TO = 256  # numbers per image; above it PCA
COMPONENTS = 64


class Features(NamedTuple):
    """A linear feature space: images (n, c, h, w) in [0, 1] to (n, f), in float64."""

    name: str
    mean: Tensor | None = None  # (c*h*w,)
    basis: Tensor | None = None  # (c*h*w, f)

    def __call__(self, images: Tensor) -> Tensor:
        flat = images.flatten(1).double().cpu()
        if self.mean is None or self.basis is None:
            return flat
        return (flat - self.mean) @ self.basis


def pixels() -> Features:
    """The pixels themselves."""
    return Features("pixels")


def pca(images: Tensor, components: int = COMPONENTS) -> Features:
    """The first principal components of training images (n, c, h, w), unscaled."""
    from sklearn.decomposition import PCA

    flat = images.flatten(1).double().cpu()
    if components > min(flat.shape):
        raise ValueError(
            f"components must be at most {min(flat.shape)} for {len(flat)} images of "
            f"{flat.shape[1]} numbers, got {components}"
        )
    found = PCA(components, random_state=0).fit(flat.numpy())  # randomised where pixels are many
    mean, basis = torch.from_numpy(found.mean_), torch.from_numpy(found.components_.T.copy())
    return Features(f"pca-{components} of pixels", mean, basis)


def default_features(training_images: Tensor) -> Features:
    """Pixels for small images, else 64 principal components of the training images."""
    numbers = training_images[0].numel()
    if numbers <= PIXELS_UP_TO:
        return pixels()
    return pca(training_images, min(COMPONENTS, len(training_images)))
