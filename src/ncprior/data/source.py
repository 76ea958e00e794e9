"""What a kind of data source has to tell: how many images there are, and how to read them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from .dataset import Images


class Source(NamedTuple):
    """A source that has been looked at but not read.

    `parts` holds the number of images of each part, in order of rows. A source that comes with
    a split of its own has the keys "train" and "test" and perhaps "validation"; any other has one
    key. `labels`, where the source has them, reads the class of each image, int64 (n,).
    `validation` and `test` are the amounts (count or fraction) to set aside where the source
    does not say.
    """

    name: str
    parts: dict[str, int]
    read: Callable[[], Images]
    validation: float = 0.1
    test: float = 0.1
    labels: Callable[[], Tensor | None] | None = None


def resolve(path: str | os.PathLike[str]) -> Path:
    """Find a file or directory: as given, else under the directory $NCPRIOR_DATA.

    Raises:
        FileNotFoundError: there is none; the message has the places looked at.
        ValueError: an empty file.
    """
    given = Path(path).expanduser()
    places = [given]
    if base := os.environ.get("NCPRIOR_DATA"):
        places.append(Path(base).expanduser() / given)
    for place in places:
        if place.is_file() and place.stat().st_size == 0:
            raise ValueError(f"path: {place} is an empty file")
        if place.exists():
            return place.absolute()
    hint = "" if base else "; relative paths are also tried under $NCPRIOR_DATA if that is set"
    raise FileNotFoundError(f"path: there is no {' nor '.join(map(str, places))}{hint}")


def signature(files: list[Path], **options: object) -> dict[str, object]:
    """Describe files (name, bytes, time of change) and options, to know a cached copy by."""
    states = [(file, file.stat()) for file in files]
    return {
        "files": [[str(file.resolve()), s.st_size, s.st_mtime_ns] for file, s in states],
        "options": {name: repr(value) for name, value in options.items()},
    }
