"""Grids of images as PNG."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

CELL = 32  # pixels that a cell's longer side has at least
LARGEST_CELL = 128  # above it images are averaged down
GAP = 2  # transparent pixels between cells
FONT = 13  # pixels
INK = 128  # readable on light pages and on dark ones


def grid(
    images: Tensor,
    columns: int = 8,
    scale: int | None = None,
    labels: Sequence[str] = (),
) -> bytes:
    """Lay out images row by row; a PNG with transparent gaps, grey or RGB as the images are.

    Args:
        images: (n, c, h, w) in [0, 1] with 1 or 3 channels; values outside are clipped.
        columns: Images in a row.
        scale: Whole number of PNG pixels per image pixel and side. By default cells are 32 to 64
            pixels wide; images of more than 128 are averaged down to at most 128.
        labels: What is written to the left of the rows, from the first on.

    Returns:
        The content of a PNG file, in mode LA or RGBA.

    Raises:
        ValueError: images of another shape or not finite, or columns or scale below 1.
    """
    from PIL import Image

    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(f"images must have the shape (n, 1 or 3, h, w), got {tuple(images.shape)}")
    if columns < 1 or (scale is not None and scale < 1):
        raise ValueError(f"columns and scale must be at least 1, got {columns=}, {scale=}")
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")
    images = images.detach().cpu().float().clamp(0, 1)
    if scale is None:
        images, scale = _to_cell(images)
    pixels = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()  # (n, h, w, c)
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    n, h, w, c = pixels.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    canvas = np.zeros((rows * (h + GAP) - GAP, columns * (w + GAP) - GAP, c + 1), np.uint8)
    for i, image in enumerate(pixels):
        top, left = (i // columns) * (h + GAP), (i % columns) * (w + GAP)
        cell = canvas[top : top + h, left : left + w]
        cell[..., :c], cell[..., c] = image, 255
    picture, content = Image.fromarray(canvas, "LA" if c == 1 else "RGBA"), io.BytesIO()
    if labels:
        picture = _labelled(picture, labels, h + GAP)
    picture.save(content, "png", optimize=True)
    return content.getvalue()


def _labelled(picture: Any, labels: Sequence[str], row: int) -> Any:
    """The picture with a margin at the left, in which the names of the rows stand."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT)
    margin = math.ceil(max(font.getlength(label) for label in labels)) + 4 * GAP
    wider = Image.new(picture.mode, (margin + picture.width, picture.height))
    wider.paste(picture, (margin, 0))
    ink = (INK,) * (len(picture.getbands()) - 1) + (255,)
    for i, label in enumerate(labels):
        at = (margin - 2 * GAP, i * row + (row - GAP) / 2)
        ImageDraw.Draw(wider).text(at, label, fill=ink, font=font, anchor="rm")
    return wider


def _to_cell(images: Tensor) -> tuple[Tensor, int]:
    """Images of a size fit for a cell, and the scale that makes them fill it."""
    longer = max(images.shape[-2:])
    if longer > LARGEST_CELL:
        images = F.avg_pool2d(images, math.ceil(longer / LARGEST_CELL), ceil_mode=True)
    return images, max(1, math.ceil(CELL / longer))
