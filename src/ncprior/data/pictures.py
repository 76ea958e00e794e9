"""Decode encoded pictures (PNG, JPEG, WebP, BMP) into one array of a common size."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .dataset import Images
from .store import store

if TYPE_CHECKING:
    from PIL import Image

Picture = tuple[str, Path | bytes]  # what to call it in errors, and its file or encoded bytes
Size = int | tuple[int, int] | None

_DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # modes Pillow would clip to 8 bits


def check_picture_options(image_size: Size, crop: int | None, channels: int | None) -> None:
    """Raise TypeError or ValueError for options that `read_pictures` could not use."""
    if isinstance(image_size, tuple):
        if len(image_size) != 2:
            raise ValueError(f"image_size must be an int or (height, width), got {image_size}")
        for size in image_size:
            _check_pixels("image_size", size)
    elif image_size is not None:
        _check_pixels("image_size", image_size)
    if crop is not None:
        _check_pixels("crop", crop)
    if channels not in (None, 1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels!r}")


def read_pictures(
    pictures: Callable[[], Iterator[Picture]],
    count: int,
    *,
    image_size: Size,
    crop: int | None,
    channels: int | None,
    name: str,
    signature: dict[str, object],
    memory_limit: int,
    cache: str | None,
) -> Images:
    """Decode pictures one by one into uint8 (count, c, h, w).

    A picture is first cut to a square of `crop` pixels at its centre, then resized (Lanczos) to
    `image_size`. If it has not the proportions of `image_size` it is cut at its centre to have
    them, never stretched.

    Args:
        pictures: Gives the pictures, from the first, each time it is called.
        count: How many there are.
        image_size: Height and width in pixels, or one number for both; None keeps the size.
        crop: Side in pixels of the square to cut; None cuts nothing.
        channels: 1 or 3; None takes that of the first picture and insists on it.
        name: What to call the whole in errors and in the cache.
        signature: What the pictures depend on, for `store`.
        memory_limit: Largest size of the images in bytes to hold in memory.
        cache: Directory for a mapped file if they are larger.

    Raises:
        ValueError: a picture that cannot be decoded, is smaller than `crop`, has more than 8 bits
            per channel or transparent pixels, or differs from the first in size or channels.
    """
    label, data = next(pictures())
    first = _decode(label, data, image_size, crop, channels)

    def fill(images: np.ndarray) -> None:
        row = 0
        for label, data in pictures():
            picture = _decode(label, data, image_size, crop, channels)
            _check_like(picture, label, first)
            images[row] = picture
            row += 1
        assert row == count

    return store(
        (count, *first.shape),
        np.uint8,
        fill,
        name=name,
        signature=signature,
        memory_limit=memory_limit,
        cache=cache,
    )


def _decode(
    label: str, data: Path | bytes, image_size: Size, crop: int | None, channels: int | None
) -> np.ndarray:
    """Decode, crop and resize one picture; uint8 (c, h, w)."""
    from PIL import Image, ImageOps

    picture = _converted(_load(label, data), label, channels)
    if crop is not None:
        width, height = picture.size
        if min(width, height) < crop:
            raise ValueError(f"crop={crop} is more than {label} has: {height}x{width} pixels")
        left, top = (width - crop) // 2, (height - crop) // 2
        picture = picture.crop((left, top, left + crop, top + crop))
    if image_size is not None:
        height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
        picture = ImageOps.fit(picture, (width, height), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)  # (h, w) or (h, w, 3)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _load(label: str, data: Path | bytes) -> Image.Image:
    """Decode a picture, turned upright as its EXIF data say."""
    from PIL import Image, ImageOps

    try:
        picture = Image.open(io.BytesIO(data) if isinstance(data, bytes) else data)
        with picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (
        OSError,  # includes Pillow's own "cannot identify"
        EOFError,
        SyntaxError,  # what Pillow raises for a broken PNG
        ValueError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(f"{label} cannot be read as an image: {error}") from error


def _converted(picture: Image.Image, label: str, channels: int | None) -> Image.Image:
    """Bring a picture to 8 bits grey (L) or colour (RGB)."""
    if picture.mode in _DEEP:
        raise ValueError(
            f"{label} has more than 8 bits per channel (mode {picture.mode}): convert it to 8 bits"
        )
    if picture.has_transparency_data:
        alpha = picture.convert("RGBA").getchannel("A")
        low, _ = alpha.getextrema()
        if low != 255:
            raise ValueError(f"{label} has transparent pixels: paste it on a background first")
    if channels is None:
        channels = 1 if picture.mode in ("1", "L", "LA", "La") else 3
    return picture.convert("L" if channels == 1 else "RGB")


def _check_pixels(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a number of pixels (int), got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1 pixel, got {value}")


def _check_like(picture: np.ndarray, label: str, first: np.ndarray) -> None:
    if picture.shape == first.shape:
        return
    (c, h, w), (c1, h1, w1) = picture.shape, first.shape
    if (h, w) != (h1, w1):
        raise ValueError(
            f"{label} has {h}x{w} pixels, the first image {h1}x{w1}: pass image_size=<pixels> to "
            "bring all images to one size"
        )
    raise ValueError(
        f"{label} has {c} channels, the first image {c1}: pass channels=1 or channels=3"
    )
