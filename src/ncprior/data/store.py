"""Where decoded images are put: in memory, or in a mapped file if they are too many."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .dataset import Images

MEMORY_LIMIT = 4 * 2**30  # bytes

_RESERVE = 64 * 2**20  # bytes left free on the disk of the cache


def store(
    shape: tuple[int, int, int, int],
    dtype: type[np.generic],
    fill: Callable[[np.ndarray], None],
    *,
    name: str,
    signature: dict[str, object],
    memory_limit: int = MEMORY_LIMIT,
    cache: str | os.PathLike[str] | None = None,
) -> Images:
    """Fill an array in memory, or a file in the cache if it would exceed the memory limit.

    The file is written under a temporary name and moved into place when complete. One that is
    there already is used again if the signature written beside it is the one asked for.

    Args:
        shape: (n, c, h, w).
        dtype: np.uint8 or np.float32.
        fill: Writes every element of the array it is given, of that shape and dtype.
        name: Start of the file's name.
        signature: What the content depends on (files, sizes, times, options); plain JSON.
        memory_limit: Largest size in bytes to hold in memory.
        cache: Directory of the file; made if it does not exist.

    Returns:
        A tensor, or a read-only memmap.

    Raises:
        ValueError: the images exceed the limit and no cache is given.
        OSError: not enough room on the disk.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if size <= memory_limit:
        array = np.empty(shape, dtype)
        fill(array)
        return torch.from_numpy(array)
    if cache is None:
        raise ValueError(
            f"the images of {name} take {size:,} bytes, more than memory_limit={memory_limit:,}: "
            "pass cache=<directory> to keep them in a mapped file there, or a larger memory_limit"
        )
    directory = Path(cache).expanduser()
    directory.mkdir(parents=True, exist_ok=True)
    wanted = json.dumps(
        {"shape": shape, "dtype": np.dtype(dtype).str, **signature}, sort_keys=True, indent=1
    )
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:16]
    file = directory / f"{_plain(name)}-{digest}.npy"
    found = _reuse(file, wanted, shape)
    return _write(file, wanted, shape, dtype, fill, size) if found is None else found


def _reuse(file: Path, wanted: str, shape: tuple[int, int, int, int]) -> np.memmap | None:
    """Open a complete file with the signature wanted; None if there is none."""
    note = file.with_suffix(".json")
    try:
        if note.read_text() != wanted:
            return None
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):  # not there, or cut short
        return None
    return mapped if isinstance(mapped, np.memmap) and mapped.shape == shape else None


def _write(
    file: Path,
    note: str,
    shape: tuple[int, int, int, int],
    dtype: type[np.generic],
    fill: Callable[[np.ndarray], None],
    size: int,
) -> np.memmap:
    free = shutil.disk_usage(file.parent).free
    if free < size + _RESERVE:
        raise OSError(
            f"cache: {file.parent} has {free:,} bytes free, the images take {size:,}; make room, "
            "or pass another directory"
        )
    temporary = file.with_name(f".{file.stem}.{os.getpid()}.npy")
    temporary_note = temporary.with_suffix(".json")
    try:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=shape)
        fill(array)
        array.flush()
        del array  # closes the file, which Windows wants before it is moved
        temporary_note.write_text(note)
        temporary.replace(file)
        temporary_note.replace(file.with_suffix(".json"))  # last: it vouches for the images
    finally:
        temporary.unlink(missing_ok=True)
        temporary_note.unlink(missing_ok=True)
    mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    assert isinstance(mapped, np.memmap)
    return mapped


def _plain(name: str) -> str:
    """Keep letters, digits, dash and underscore, so that any name can be a file's."""
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
