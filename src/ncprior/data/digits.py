"""The 1,797 handwritten digits of 8 by 8 pixels that come with scikit-learn."""

from __future__ import annotations

import torch
from torch import Tensor

from .source import Source

_COUNT = 1797


def open_digits() -> Source:
    """Offer the digits as grey images (1797, 1, 8, 8), uint8.

    scikit-learn has 17 levels, 0 to 16; they become the bytes round(level * 255 / 16). Unless told
    otherwise 97 images are set aside for validation and 350 for test, which leaves 1,350.
    """
    return Source("digits", {"all": _COUNT}, _read, validation=97, test=350, labels=_read_labels)


def _read() -> Tensor:
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    levels = torch.from_numpy(load_digits().images)  # (n, 8, 8), float64, 0 to 16
    return (levels * 255 / 16).round().to(torch.uint8).unsqueeze(1)


def _read_labels() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().target).long()
