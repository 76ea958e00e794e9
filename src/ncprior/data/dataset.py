"""Images in memory or in a mapped file, read in batches of rows as floats in [0, 1]."""

from __future__ import annotations

import hashlib
import math
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from .binary import draw_binary, draw_bits, unpack_bits

Images = Tensor | np.memmap
Binarize = Literal["dynamic"] | int | None

_CHUNK = 1 << 24  # pixels looked at together when a whole data set is gone through


class ImageDataset:
    """Images (n, c, h, w) of one size, read as float32 batches in [0, 1].

    Example:
        >>> data = ImageDataset(torch.full((4, 1, 2, 2), 255, dtype=torch.uint8), name="white")
        >>> data.batch(torch.tensor([0, 3])).shape
        torch.Size([2, 1, 2, 2])
    """

    def __init__(
        self,
        images: Images,
        *,
        labels: Tensor | None = None,
        name: str = "images",
        binarize: Binarize = None,
        flip: bool = False,
    ) -> None:
        """Wrap images; nothing is copied.

        Args:
            images: (n, c, h, w), uint8 (0 to 255) or float32 in [0, 1]: a CPU tensor, or a numpy
                memmap if too large for memory.
            labels: The class of each image, int64 (n,), from 0 up; None where it is not known.
            name: What to call the data in reports and errors.
            binarize: None keeps the grey values. "dynamic" draws each pixel as 0 or 1 with its
                grey value as the probability of 1, anew at every call of `batch`. An int draws
                them once, now, with that seed: row i is then the same image in every batch. It
                costs one more bit per pixel of memory.
            flip: Mirror each image left to right with probability 1/2, at every call of `batch`.

        Raises:
            TypeError: images or an option of the wrong type.
            ValueError: images of the wrong shape, none at all, or floats outside [0, 1]; labels
                that are not one for each image, or negative.
        """
        check_binarize(binarize)
        if not isinstance(flip, bool):
            raise TypeError(f"flip must be True or False, got {flip!r}")
        _check_images(images)
        if labels is not None:
            _check_labels(labels, len(images))
        self.images = images
        self.labels = labels
        self.name = name
        self.binarize = binarize
        self.flip = flip
        self._bits = self._draw_all(binarize) if isinstance(binarize, int) else None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        c, h, w = self.image_shape
        return (
            f"ImageDataset({self.name!r}, {len(self)} images of {c}x{h}x{w}, "
            f"binarize={self.binarize!r}, flip={self.flip})"
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        _, c, h, w = self.images.shape
        return c, h, w

    @property
    def redrawn(self) -> bool:
        """Whether each pass draws the images anew, so that `batch` needs a generator."""
        return self.binarize == "dynamic" or self.flip

    def digest(self) -> str:
        """SHA-256 of the images' shape and of 64 images at even steps: tells data sets apart."""
        rows = torch.linspace(0, len(self) - 1, min(64, len(self))).round().long()
        found = hashlib.sha256(str(tuple(self.images.shape)).encode())
        found.update(self.raw(rows).numpy().tobytes())
        return found.hexdigest()

    def batch(self, rows: Tensor, *, generator: Generator | None = None) -> Tensor:
        """Read some images as a model is to see them: flipped and binarised if so asked.

        Args:
            rows: Row numbers, int64, (b,), on the CPU.
            generator: Source of all randomness, on the CPU; needed only if `redrawn`.

        Returns:
            float32 (b, c, h, w) in [0, 1], on the CPU; a new tensor.

        Raises:
            ValueError: a data set that is redrawn, without a generator or with one that does not
                live on the CPU; rows that have not one axis.
            IndexError: a row out of range.
        """
        if self.redrawn:
            _check_generator(generator)
        self._check_rows(rows)
        if self._bits is None:
            images = self._select(rows)
        else:
            images = unpack_bits(self._bits[rows.numpy()], self.image_shape)
        if self.flip:
            mirrored = torch.rand(len(rows), generator=generator) < 0.5  # (b,)
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.binarize == "dynamic":
            assert generator is not None
            return draw_binary(images, generator=generator)
        return _as_float(images)

    def raw(self, rows: Tensor) -> Tensor:
        """Read some images as they are stored: grey values, never flipped nor binarised.

        Args:
            rows: Row numbers, int64, (b,), on the CPU.

        Returns:
            float32 (b, c, h, w) in [0, 1], on the CPU; a new tensor.

        Raises:
            ValueError, IndexError: rows that have not one axis or are out of range.
        """
        self._check_rows(rows)
        return _as_float(self._select(rows))

    def _check_rows(self, rows: Tensor) -> None:
        if rows.dim() != 1 or rows.dtype != torch.int64:
            raise ValueError(
                "rows must be int64 row numbers with one axis, got "
                f"{rows.dtype} of shape {tuple(rows.shape)}"
            )
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(
                f"rows must lie between 0 and {len(self) - 1}, got {int(rows.min())} to "
                f"{int(rows.max())}"
            )

    def _select(self, rows: Tensor) -> Tensor:
        """Copy rows out, in the type they are stored in, (b, c, h, w)."""
        if isinstance(self.images, Tensor):
            return self.images.index_select(0, rows)
        return torch.from_numpy(np.ascontiguousarray(self.images[rows.numpy()]))

    def _draw_all(self, seed: int) -> np.ndarray:
        """Binarise every image once; packed bits, (n, ceil(c*h*w / 8))."""
        generator = torch.Generator().manual_seed(seed)
        c, h, w = self.image_shape
        step = max(1, _CHUNK // (c * h * w))
        bits = np.empty((len(self), (c * h * w + 7) // 8), dtype=np.uint8)
        for start in range(0, len(self), step):
            rows = torch.arange(start, min(start + step, len(self)))
            bits[start : start + step] = draw_bits(self._select(rows), generator=generator)
        return bits


def check_binarize(binarize: object) -> None:
    """Raise TypeError or ValueError unless binarize is None, "dynamic" or a seed."""
    if binarize is None or binarize == "dynamic":
        return
    if isinstance(binarize, bool) or not isinstance(binarize, int):
        raise TypeError(
            'binarize must be None, "dynamic" (drawn anew at every pass) or an int (the seed of '
            f"one fixed draw), got {binarize!r}"
        )
    if not 0 <= binarize < 2**63:
        raise ValueError(f"binarize as a seed must lie in [0, 2^63), got {binarize}")


def _as_float(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _check_generator(generator: Generator | None) -> None:
    if generator is None:
        raise ValueError(
            "generator is needed: these images are binarised or flipped anew at every call "
            "(use raw(rows) for the images as stored)"
        )
    if generator.device.type != "cpu":
        raise ValueError(f"generator must live on the CPU, got one on {generator.device}")


def _check_labels(labels: Tensor, n: int) -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(
            f"labels must be an int64 tensor, got {getattr(labels, 'dtype', type(labels))}"
        )
    if labels.shape != (n,):
        raise ValueError(f"labels must have the shape ({n},), got {tuple(labels.shape)}")
    if labels.min() < 0:
        raise ValueError(f"labels must not be negative, got {int(labels.min())}")


def _check_images(images: Images) -> None:
    if not isinstance(images, Tensor | np.memmap):
        raise TypeError(
            "images must be a torch tensor or a numpy memmap, got "
            f"{type(images).__name__}; for a numpy array pass torch.from_numpy(array)"
        )
    if str(images.dtype).removeprefix("torch.") not in ("uint8", "float32"):
        raise TypeError(f"images must be uint8 (0 to 255) or float32 in [0, 1], got {images.dtype}")
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            f"images must have the shape (n, c, h, w) with no axis empty, got {tuple(images.shape)}"
        )
    if not isinstance(images, Tensor):
        return  # going through a mapped file is for whoever wrote it
    if images.device.type != "cpu":
        raise ValueError(f"images must be on the CPU, got a tensor on {images.device}")
    if images.dtype == torch.float32:
        low, high = (float(v) for v in images.aminmax())
        if math.isnan(low):
            count = int(images.flatten(1).isnan().any(1).sum())
            raise ValueError(f"images must be numbers, got NaN in {count:,} of {len(images):,}")
        if not (low >= 0 and high <= 1):
            remedy = "divide by 255" if low >= 0 and 1 < high <= 255 else "bring them there first"
            raise ValueError(
                f"images as floats must lie in [0, 1], got {low:g} to {high:g}; {remedy}"
            )
