"""Which rows of a data set are for training, validation and test."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Two training images are the fewest that have a spread; two test images, the fewest with a
# standard error.
_LEAST = {"train": 2, "validation": 1, "test": 2}


class Splits(NamedTuple):
    """Row numbers of the three parts, int64, one axis each, disjoint."""

    train: Tensor
    validation: Tensor
    test: Tensor


def random_splits(n: int, validation: float, test: float, seed: int) -> Splits:
    """Deal n rows at random into the three parts; what is not validation or test is train.

    Args:
        n: Number of images, at least 5.
        validation: Number of images (int), or their fraction of n (float between 0 and 1,
            rounded, at least 1 image).
        test: Likewise, at least 2 images.
        seed: The same seed and n give the same order of rows.

    Raises:
        TypeError, ValueError: an amount of the wrong kind, or one that leaves a part empty (train
            and test need 2 images).
    """
    _check_total(n)
    n_validation = amount("validation", validation, n)
    n_test = amount("test", test, n)
    n_train = n - n_validation - n_test
    if n_train < _LEAST["train"]:
        raise ValueError(
            f"validation={validation} and test={test} leave {n_train} of {n} images for train; "
            "at least 2 are needed: make validation or test smaller"
        )
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return Splits(*order.split([n_train, n_validation, n_test]))


def fixed_splits(train: int, validation: int, test: int) -> Splits:
    """Take the parts in order of rows: first train, then validation, then test.

    Args:
        train: Number of images, at least 2.
        validation: Number of images, at least 1.
        test: Number of images, at least 2.

    Raises:
        TypeError, ValueError: a count that is not an int, or too small.
    """
    counts = {"train": train, "validation": validation, "test": test}
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name} must be a number of images (int), got {count!r}")
        _check_least(name, count)
    return Splits(*torch.arange(sum(counts.values())).split(list(counts.values())))


def check_splits(splits: Splits, n: int) -> None:
    """Check parts made by hand against a data set of n images.

    Raises:
        TypeError, ValueError: rows that are not int64 with one axis, out of range, repeated or in
            two parts, or a part with too few images.
    """
    if not isinstance(splits, Splits):
        raise TypeError(
            f"splits must be ncprior.Splits(train, validation, test), got a {type(splits).__name__}"
        )
    for name, rows in splits._asdict().items():
        if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1:
            raise TypeError(f"splits.{name} must be an int64 tensor with one axis, got {rows!r}")
        _check_least(name, len(rows), prefix="splits.")
        low, high = int(rows.min()), int(rows.max())
        if low < 0 or high >= n:
            raise ValueError(
                f"splits.{name} has rows {low} to {high}; the data set has 0 to {n - 1}"
            )
    values, counts = torch.cat(splits).unique(return_counts=True)
    if counts.max() > 1:
        row = int(values[counts.argmax()])
        raise ValueError(f"splits must be disjoint, but row {row} comes {int(counts.max())} times")


def amount(name: str, value: float, n: int) -> int:
    """Turn a count or a fraction of n images into a count.

    Args:
        name: The part, "train", "validation" or "test": named in errors, and sets the minimum.
        value: A count (int) or a fraction (float strictly between 0 and 1).
        n: What the fraction is of.

    Raises:
        TypeError, ValueError: as for `random_splits`.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{name} must be a number of images (int) or a fraction (float), got {value!r}"
        )
    if isinstance(value, float):
        if not 0 < value < 1:
            raise ValueError(
                f"{name} as a fraction must lie strictly between 0 and 1, got {value}; "
                "for a number of images pass an int"
            )
        return max(round(value * n), _LEAST[name])
    _check_least(name, value)
    return value


def _check_least(name: str, count: int, prefix: str = "") -> None:
    if count < _LEAST[name]:
        raise ValueError(f"{prefix}{name} must have at least {_LEAST[name]} images, got {count}")


def _check_total(n: int) -> None:
    least = sum(_LEAST.values())
    if n < least:
        raise ValueError(
            f"a data set needs at least {least} images to be split (2 train, 1 validation, 2 test),"
            f" got {n}"
        )
