"""Samples beside the training images that are nearest to them."""

import torch
from torch import Tensor

from ncprior.data import ImageDataset
from ncprior.metrics.neighbours import as_compared, nearest

PART = 5000  # training images read at a time


def beside_nearest(samples: Tensor, data: ImageDataset, rows: Tensor, k: int = 5) -> Tensor:
    """Each sample followed by its k nearest images among some rows, (n (k + 1), c, h, w).

    They are nearest as `metrics.neighbours.as_compared` compares images, among all the rows.

    Args:
        samples: (n, c, h, w) in [0, 1].
        data: The images.
        rows: Those that the VAE was trained on, (m,).
        k: Neighbours of each, at most m.

    Reference: section 5.3 and the appendix of Aneja et al. (NeurIPS 2021).
    """
    k = min(k, len(rows))
    compared = torch.cat([as_compared(data.raw(part)) for part in rows.split(PART)])
    found = nearest(as_compared(samples), compared, k).row  # (n, k)
    neighbours = data.raw(rows[found.flatten()]).view(len(samples), k, *data.image_shape)
    return torch.cat([samples[:, None].float(), neighbours], 1).flatten(0, 1)
