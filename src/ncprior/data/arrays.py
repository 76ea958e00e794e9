"""Images in numpy files: .npy, mapped, and .npz, read as a stream. Nothing is ever unpickled."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from .dataset import Images
from .source import Source, signature
from .store import MEMORY_LIMIT, store

_STEP = 1 << 24  # bytes gone through at a time


class _Layout(NamedTuple):
    """What the header of an array says, and what its images will be."""

    path: Path
    key: str | None  # of an .npz
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    channels_last: bool
    image_shape: tuple[int, int, int]

    @property
    def label(self) -> str:
        return str(self.path) if self.key is None else f"array {self.key!r} of {self.path}"


def open_array(
    path: Path,
    *,
    key: str | None = None,
    memory_limit: int = MEMORY_LIMIT,
    cache: str | None = None,
) -> Source:
    """Look at images in a .npy or .npz file; only its header is read now.

    Shapes (n, h, w), (n, c, h, w) and (n, h, w, c) with c 1 or 3 are taken; where both of the
    last two fit, the channels are on the second axis. uint8 is 0 to 255, bool is black and white,
    floats are in [0, 1] and are kept as float32. A .npy file of uint8 or float32 beyond the memory
    limit stays where it is and is mapped.

    Args:
        path: The file.
        key: Which array of an .npz; needed if more than one could be images.
        memory_limit: Largest size of the images in bytes to hold in memory.
        cache: Directory for a mapped file if they are larger and cannot be mapped as they are.

    Raises:
        ValueError: a damaged file, an array of objects, or one of another shape or type; when
            read: NaN, infinite or out of range values, with the first row that has one.
    """
    if path.is_dir():
        raise ValueError(f"path: {path} is a directory; source 'array' takes an .npy or .npz file")
    layout = _look(path, key)

    def read() -> Images:
        return _read(layout, memory_limit, cache)

    return Source(path.stem, {"all": layout.shape[0]}, read)


def _look(path: Path, key: str | None) -> _Layout:
    zipped = _is_zip(path)
    if not zipped and key is not None:
        raise ValueError(f"key={key!r} chooses an array of an .npz file, but {path} is not one")
    if zipped:
        key = _choose(path, key)
    with _opened(path, key) as stream:
        shape, fortran, dtype = _header(stream, path)
    label = str(path) if key is None else f"array {key!r} of {path}"
    if dtype.hasobject:
        raise ValueError(
            f"path: {label} holds Python objects, which only unpickling could read; that is never "
            "done: save a plain array of numbers"
        )
    channels_last, image_shape = _axes(shape, label)
    layout = _Layout(path, key, shape, dtype, fortran, channels_last, image_shape)
    if dtype not in (np.uint8, np.bool_) and dtype.kind != "f":
        raise ValueError(
            f"path: {label} must be uint8 (0 to 255), bool or floats in [0, 1], got "
            f"{dtype}{_range_of_start(layout)}: scale and convert it, for instance with "
            ".astype(np.uint8), and save it again"
        )
    return layout


def _axes(shape: tuple[int, ...], label: str) -> tuple[bool, tuple[int, int, int]]:
    """Find whether the channels come last, and the (c, h, w) of an image."""
    if len(shape) not in (3, 4) or 0 in shape:
        raise ValueError(
            f"path: {label} must have the shape (n, h, w), (n, c, h, w) or (n, h, w, c) with no "
            f"axis empty, got {shape}"
        )
    if len(shape) == 3:
        return False, (1, shape[1], shape[2])
    _, a, b, c = shape
    if a in (1, 3):
        return False, (a, b, c)
    if c in (1, 3):
        return True, (c, a, b)
    alpha = ": drop the alpha channel first" if 4 in (a, c) else ""
    raise ValueError(
        f"path: {label} must have 1 or 3 channels, as its second or last axis, got {shape}{alpha}"
    )


def _read(layout: _Layout, memory_limit: int, cache: str | None) -> Images:
    n, (c, h, w) = layout.shape[0], layout.image_shape
    kept = np.float32 if layout.dtype.kind == "f" else np.uint8
    too_large = n * c * h * w * np.dtype(kept).itemsize > memory_limit
    if too_large and layout.key is None and layout.dtype == kept:
        return _mapped(layout, kept)

    def fill(images: np.ndarray) -> None:
        peak = 0.0
        for row, chunk in _chunks(layout):
            part = _converted(chunk, row, layout)
            images[row : row + len(part)] = part
            peak = max(peak, float(part.max()))
        _check_peak(peak, kept, layout)

    return store(
        (n, c, h, w),
        kept,
        fill,
        name=layout.path.stem,
        signature=signature([layout.path], key=layout.key),
        memory_limit=memory_limit,
        cache=cache,
    )


def _mapped(layout: _Layout, kept: type[np.generic]) -> np.memmap:
    """Check an .npy file in runs of rows and hand it out where it lies, as (n, c, h, w)."""
    peak = 0.0
    for row, chunk in _chunks(layout):
        peak = max(peak, float(_converted(chunk, row, layout).max()))
        if kept is np.uint8 and peak > 1:
            break  # nothing else can be wrong with bytes
    _check_peak(peak, kept, layout)
    mapped = cast(np.memmap, _whole(layout))
    if layout.channels_last:
        return cast(np.memmap, np.moveaxis(mapped, 3, 1))
    return mapped if mapped.ndim == 4 else cast(np.memmap, mapped[:, None])


def _converted(chunk: np.ndarray, row: int, layout: _Layout) -> np.ndarray:
    """Check rows and bring them to uint8 or float32, (k, c, h, w)."""
    if layout.channels_last:
        chunk = np.moveaxis(chunk, 3, 1)
    chunk = chunk.reshape(len(chunk), *layout.image_shape)
    if chunk.dtype == np.bool_:
        return chunk.astype(np.uint8) * 255
    if chunk.dtype == np.uint8:
        return chunk
    flat = chunk.reshape(len(chunk), -1)
    finite = np.isfinite(flat).all(axis=1)  # (k,)
    if not finite.all():
        raise ValueError(
            f"path: {layout.label} has NaN or infinite values, first in row "
            f"{row + int(finite.argmin())}"
        )
    low, high = flat.min(axis=1), flat.max(axis=1)
    outside = (low < 0) | (high > 1)
    if outside.any():
        first = int(outside.argmax())
        remedy = (
            "divide by 255, or save it as uint8"
            if low.min() >= 0 and high.max() <= 255
            else "rescale it, for instance (x - min) / (max - min)"
        )
        raise ValueError(
            f"path: {layout.label} must have floats in [0, 1], got {low[first]:g} to "
            f"{high[first]:g} in row {row + first}: {remedy}"
        )
    return chunk.astype(np.float32)


def _check_peak(peak: float, kept: type[np.generic], layout: _Layout) -> None:
    """Refuse bytes of 0 and 1 only: read as 0 to 255 they would be as good as black."""
    if peak == 1 and kept is np.uint8:
        raise ValueError(
            f"path: {layout.label} is uint8 with no value above 1, where white is 255: save black "
            "and white images as bool, or multiply by 255"
        )


def _chunks(layout: _Layout) -> Iterator[tuple[int, np.ndarray]]:
    """Go through an array in runs of rows: (number of the first row, rows)."""
    n, row_shape = layout.shape[0], layout.shape[1:]
    row_bytes = int(np.prod(row_shape)) * layout.dtype.itemsize
    step = max(1, _STEP // row_bytes)
    if layout.key is None or layout.fortran:
        array = _whole(layout)
        for row in range(0, n, step):
            yield row, np.asarray(array[row : row + step])
        return
    with _opened(layout.path, layout.key) as stream:
        _header(stream, layout.path)
        for row in range(0, n, step):
            count = min(step, n - row)
            data = stream.read(count * row_bytes)
            if len(data) < count * row_bytes:
                raise ValueError(f"path: {layout.label} is cut short in row {row} or after it")
            yield row, np.frombuffer(data, layout.dtype).reshape(count, *row_shape)


def _whole(layout: _Layout) -> np.ndarray:
    """Map an .npy file, or load an array of an .npz that is in columns and cannot be streamed."""
    try:
        loaded = np.load(
            layout.path, mmap_mode="r" if layout.key is None else None, allow_pickle=False
        )
        return loaded if layout.key is None else loaded[layout.key]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"path: {layout.label} is cut short or damaged: {error}") from error


def _range_of_start(layout: _Layout) -> str:
    """Say the range of the first rows, for an error about a type; nothing if it has no order."""
    if layout.dtype.kind not in "iu":
        return ""
    _, chunk = next(_chunks(layout))
    return f" (its first {len(chunk)} images have values from {chunk.min()} to {chunk.max()})"


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        start = stream.read(6)
    if start.startswith(b"PK"):
        return True
    if start == b"\x93NUMPY":
        return False
    raise ValueError(
        f"path: {path} is neither an .npy nor an .npz file: it begins with {start!r}. Pickles are "
        "never loaded; for images in other formats see source 'folder', 'hub' or 'idx'"
    )


def _choose(path: Path, key: str | None) -> str:
    """Settle which array of an .npz is meant."""
    try:
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise ValueError(f"path: {path} is cut short or damaged: {error}") from error
    if key is not None:
        if key not in keys:
            raise ValueError(f"key must be one of the arrays of {path}, {keys}, got {key!r}")
        return key
    if len(keys) == 1:
        return keys[0]
    likely = []
    for name in keys:
        with _opened(path, name) as stream:
            if len(_header(stream, path)[0]) in (3, 4):
                likely.append(name)
    if len(likely) != 1:
        raise ValueError(f"key is needed: {path} has several arrays, {keys}; pass key=<one>")
    return likely[0]


@contextmanager
def _opened(path: Path, key: str | None) -> Iterator[BinaryIO]:
    """Open an .npy file, or one in an .npz; say damage in words."""
    if key is None:
        with path.open("rb") as stream:
            yield stream
        return
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
            yield cast(BinaryIO, member)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"path: {path} is cut short or damaged: {error}") from error


def _header(stream: BinaryIO, path: Path) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape, the order (True: Fortran) and the type of an .npy file."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            return np.lib.format.read_array_header_1_0(stream)
        return np.lib.format.read_array_header_2_0(stream)
    except ValueError as error:
        raise ValueError(f"path: {path} has no readable header of an array: {error}") from error
