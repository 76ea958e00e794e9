"""A folder of picture files, with its subfolders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .dataset import Images
from .pictures import Picture, Size, check_picture_options, read_pictures
from .source import Source, signature
from .store import MEMORY_LIMIT

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def open_folder(
    path: Path,
    *,
    image_size: Size = None,
    crop: int | None = None,
    channels: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    cache: str | None = None,
) -> Source:
    """Look at the pictures in a folder and below it, in the order of their names.

    Hidden files and all that is not .png, .jpg, .jpeg, .webp or .bmp are passed over.

    Args:
        path: The folder.
        image_size: Height and width in pixels, or one number for both; None keeps the size.
        crop: Side in pixels of the square to cut at the centre before that; None cuts nothing.
        channels: 1 or 3; None takes that of the first picture and insists on it.
        memory_limit: Largest size of the images in bytes to hold in memory.
        cache: Directory for a mapped file if they are larger.

    Raises:
        TypeError, ValueError: a wrong option, a path that is no folder or has no pictures; when
            read: as for `read_pictures`.
    """
    check_picture_options(image_size, crop, channels)
    if not path.is_dir():
        raise ValueError(f"path: source 'folder' takes a directory, and {path} is a file")
    files = sorted(
        (file for file in path.rglob("*") if _is_picture(file)),
        key=lambda file: file.relative_to(path).as_posix(),
    )
    if not files:
        raise ValueError(f"path: {path} has no images in it or below it ({', '.join(_SUFFIXES)})")

    def pictures() -> Iterator[Picture]:
        return ((str(file), file) for file in files)

    def read() -> Images:
        return read_pictures(
            pictures,
            len(files),
            image_size=image_size,
            crop=crop,
            channels=channels,
            name=path.name,
            signature=signature(files, image_size=image_size, crop=crop, channels=channels),
            memory_limit=memory_limit,
            cache=cache,
        )

    return Source(path.name, {"all": len(files)}, read)


def _is_picture(file: Path) -> bool:
    return file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
