"""Files in the idx format of MNIST and Fashion-MNIST, plain or compressed with gzip."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from .dataset import Images
from .source import Source, signature
from .store import MEMORY_LIMIT, store

_FILES = {"train": "train-images", "test": "t10k-images"}
_HEADER = 16  # bytes: magic 0 0 type axes, then three sizes, big-endian
_STEP = 1 << 23  # bytes read at a time
_DEFLATE = 1040  # gzip cannot shrink by more than 1 : 1032


class _File(NamedTuple):
    path: Path
    number: int
    height: int
    width: int


def open_idx(path: Path, *, memory_limit: int = MEMORY_LIMIT, cache: str | None = None) -> Source:
    """Look at grey images in one idx file, or in the train and t10k files of a directory.

    With both files, those of t10k are for test and the last sixth of those of train for
    validation, which is 50,000 / 10,000 / 10,000 for MNIST. Labels are read where every file of
    images has one beside it whose name says labels-idx1 for images-idx3.

    Args:
        path: A file, or a directory with train-images-idx3-ubyte and t10k-images-idx3-ubyte, each
            plain or with .gz (one of the two is enough).
        memory_limit: Largest size of the images in bytes to hold in memory.
        cache: Directory for a mapped file if they are larger.

    Raises:
        FileNotFoundError: no such files in the directory.
        ValueError: a file that is not idx images, is empty, too short, too long or damaged, or
            two files whose images differ in size.
    """
    files = {part: _look(file) for part, file in _find(path).items()}
    sizes = {(file.height, file.width) for file in files.values()}
    if len(sizes) > 1:
        raise ValueError(f"path: the files in {path} have images of different sizes: {sizes}")

    def read() -> Images:
        return _read(list(files.values()), path.name, memory_limit, cache)

    def labels() -> Tensor | None:
        beside = [_beside(file.path) for file in files.values()]
        found = zip(beside, files.values(), strict=True)
        if not all(beside):
            return None
        return torch.cat([_read_labels(path, file.number) for path, file in found if path])

    parts = {part: file.number for part, file in files.items()}
    validation = 1 / 6 if len(parts) > 1 else 0.1
    return Source(path.name, parts, read, validation=validation, labels=labels)


def _find(path: Path) -> dict[str, Path]:
    if not path.is_dir():
        return {"all": path}
    found = {}
    for part, stem in _FILES.items():
        names = [f"{stem}{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
        if there := [path / name for name in names if (path / name).is_file()]:
            found[part] = there[0]
    if not found:
        raise FileNotFoundError(
            f"path: {path} has neither train-images-idx3-ubyte nor t10k-images-idx3-ubyte, "
            "plain or with .gz"
        )
    return found


def _look(path: Path) -> _File:
    """Read and check a header, and that the file can hold what it promises."""
    with _opened(path) as (stream, compressed):
        header = stream.read(_HEADER)
    if len(header) < 4 or header[:2] != b"\0\0":
        raise ValueError(f"path: {path} is not an idx file: it begins with {header[:4]!r}")
    kind, axes = header[2], header[3]
    if kind != 0x08 or axes != 3:
        labels = " (labels, perhaps)" if axes == 1 else ""
        raise ValueError(
            f"path: {path} must hold uint8 images (magic 0 0 8 3), got type {kind} with {axes} "
            f"axes{labels}"
        )
    if len(header) < _HEADER:
        raise ValueError(f"path: {path} is cut short: its header has {len(header)} of 16 bytes")
    count, height, width = (int(v) for v in np.frombuffer(header, ">u4", offset=4))
    if 0 in (count, height, width):
        raise ValueError(f"path: {path} has no images: {count} of {height}x{width} pixels")

    size, wanted = path.stat().st_size, count * height * width + _HEADER
    if size * _DEFLATE < wanted if compressed else size != wanted:
        raise ValueError(
            f"path: {path} is cut short or damaged: {count} images of {height}x{width} pixels "
            f"{'unpack to' if compressed else 'take'} {wanted:,} bytes, the file has {size:,}"
        )
    return _File(path, count, height, width)


def _read(files: list[_File], name: str, memory_limit: int, cache: str | None) -> Images:
    def fill(images: np.ndarray) -> None:
        start = 0
        for file in files:
            _read_into(images[start : start + file.number], file.path)
            start += file.number

    shape = (sum(file.number for file in files), 1, files[0].height, files[0].width)
    return store(
        shape,
        np.uint8,
        fill,
        name=name,
        signature=signature([file.path for file in files]),
        memory_limit=memory_limit,
        cache=cache,
    )


def _read_into(images: np.ndarray, path: Path) -> None:
    flat = images.reshape(-1)  # a view: a run of rows is contiguous
    done = 0
    with _opened(path) as (stream, _):
        stream.read(_HEADER)
        while done < flat.size and (data := stream.read(min(_STEP, flat.size - done))):
            flat[done : done + len(data)] = np.frombuffer(data, np.uint8)
            done += len(data)
        surplus = bool(stream.read(1))  # of a gzip file, this also checks the sum at its end
    if done < flat.size or surplus:
        raise ValueError(
            f"path: {path} must hold {math.prod(images.shape):,} bytes of pixels, as its header "
            f"says, but has {'more' if surplus else f'only {done:,}'}"
        )


def _beside(images: Path) -> Path | None:
    """The file of the labels of a file of images, compressed or not, if there is one."""
    plain = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    places = [images.with_name(plain + end) for end in ("", ".gz")]
    return next((place for place in places if place.is_file() and place.name != images.name), None)


def _read_labels(path: Path, count: int) -> Tensor:
    with _opened(path) as (stream, _):
        content = stream.read()
    if content[:4] != b"\0\0\x08\x01" or len(content) < 8:
        raise ValueError(
            f"path: {path} must hold uint8 labels (magic 0 0 8 1), it begins with {content[:4]!r}"
        )
    said, held = int.from_bytes(content[4:8], "big"), len(content) - 8
    if (said, held) != (count, count):
        raise ValueError(
            f"path: {path} must hold a label for each of {count} images; its header says {said}, "
            f"and it has {held}"
        )
    return torch.tensor(list(content[8:]))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, bool]]:
    """Open a file, unpacking it if it is gzip whatever its name; say damage in words."""
    if path.stat().st_size == 0:
        raise ValueError(f"path: {path} is an empty file")
    with path.open("rb") as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
    try:
        with cast(BinaryIO, gzip.open(path, "rb") if compressed else path.open("rb")) as stream:
            yield stream, compressed
    except EOFError as error:
        raise ValueError(f"path: {path} is cut short: its gzip data has no end") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"path: {path} is damaged: its gzip data is wrong ({error})") from error
