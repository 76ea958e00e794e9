"""One call for every kind of data: images and their parts."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path

from .arrays import open_array
from .dataset import Binarize, ImageDataset, check_binarize
from .digits import open_digits
from .folder import open_folder
from .hub import open_hub
from .idx import open_idx
from .pictures import Size
from .source import Source, resolve
from .splits import Splits, amount, fixed_splits, random_splits
from .store import MEMORY_LIMIT

SOURCES: dict[str, Callable[..., Source]] = {
    "digits": open_digits,
    "idx": open_idx,
    "array": open_array,
    "folder": open_folder,
    "hub": open_hub,
}


def load_data(
    source: str = "digits",
    path: str | os.PathLike[str] | None = None,
    *,
    binarize: Binarize = None,
    flip: bool = False,
    image_size: Size | list[int] = None,
    crop: int | None = None,
    channels: int | None = None,
    key: str | None = None,
    column: str | None = None,
    split: str | None = None,
    validation: float | None = None,
    test: float | None = None,
    seed: int = 0,
    memory_limit: int = MEMORY_LIMIT,
    cache: str | os.PathLike[str] | None = None,
) -> tuple[ImageDataset, Splits]:
    """Load images and say which are for training, validation and test.

    A source with a test part of its own (idx with both files, hub) keeps it, and in the order of
    its rows: validation, unless it has that too, is cut from the end of its train part. Every
    other source is dealt at random by `seed`.

    Args:
        source: "digits" (embedded, 8x8), "idx" (MNIST and Fashion-MNIST files), "array" (.npy,
            .npz), "folder" (of pictures) or "hub" (parquet files, or a name on the Hugging Face
            hub).
        path: Where it is; none for "digits". Looked for as given, then under $NCPRIOR_DATA.
        binarize: None keeps grey values, "dynamic" draws black and white anew at every pass, an
            int draws it once with that seed; see `ImageDataset`.
        flip: Mirror images at random at every pass.
        image_size: folder, hub: (height, width) in pixels, or one number for both.
        crop: folder, hub: side of a square to cut at the centre, before resizing.
        channels: folder, hub: 1 (grey) or 3 (colour).
        key: array: which array of an .npz file.
        column: hub: which column has the images.
        split: hub: the one part to read.
        validation: Number of images (int) or fraction (float). By default 1/10; for idx with both
            files 1/6 of the train file; for digits 97.
        test: Likewise, by default 1/10; for digits 350.
        seed: Of the random split; says nothing about `binarize`.
        memory_limit: Largest size of the images in bytes to hold in memory (4 GiB).
        cache: Directory for a mapped file if they are larger.

    Returns:
        The data set and its splits.

    Raises:
        FileNotFoundError: no such path; the message has the places looked at.
        ModuleNotFoundError: a package of the extra `data` is missing.
        TypeError, ValueError: a wrong option, one that the source has no use for, images that
            cannot be read, or too few of them to split.
    """
    check_binarize(binarize)
    if not isinstance(flip, bool):
        raise TypeError(f"flip must be True or False, got {flip!r}")
    _check_int("seed", seed, 0)
    _check_int("memory_limit", memory_limit, 1)
    opener = _opener(source)
    options: dict[str, object] = {
        "image_size": tuple(image_size) if isinstance(image_size, list) else image_size,
        "crop": crop,
        "channels": channels,
        "key": key,
        "column": column,
        "split": split,
    }
    taken = set(inspect.signature(opener).parameters)
    _check_options(source, options, taken)
    arguments: dict[str, object] = {
        name: value for name, value in options.items() if value is not None
    }
    if "memory_limit" in taken:
        arguments |= {"memory_limit": memory_limit, "cache": cache}

    place = _place(source, path, "path" in taken)
    opened = opener(*place, **arguments)
    splits = _splits(opened, source, validation, test, seed)  # before reading: it may take long
    labels = opened.labels() if opened.labels else None
    data = ImageDataset(
        opened.read(), labels=labels, name=opened.name, binarize=binarize, flip=flip
    )
    return data, splits


def _opener(source: str) -> Callable[..., Source]:
    if source not in SOURCES:
        near = difflib.get_close_matches(str(source), SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}{hint}")
    return SOURCES[source]


def _check_options(source: str, options: dict[str, object], taken: set[str]) -> None:
    for name, value in options.items():
        if value is not None and name not in taken:
            own = sorted(taken & set(options))
            raise ValueError(
                f"{name}={value!r} makes no sense for source {source!r}, which takes "
                f"{', '.join(own) or 'none of these options'}"
            )


def _place(source: str, path: str | os.PathLike[str] | None, wanted: bool) -> list[Path | str]:
    """Find what the source is to open; a name on the hub is left as it is."""
    if not wanted:
        if path is not None:
            raise ValueError(f"path={str(path)!r} makes no sense for source {source!r}")
        return []
    if path is None:
        raise ValueError(f"path is needed for source {source!r}")
    try:
        return [resolve(path)]
    except FileNotFoundError:
        if source == "hub" and _is_hub_name(path):
            return [str(path)]
        raise


def _is_hub_name(path: str | os.PathLike[str]) -> bool:
    name = str(path)
    return bool(re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name)) and not name.endswith(".parquet")


def _splits(
    opened: Source, source: str, validation: float | None, test: float | None, seed: int
) -> Splits:
    given = {"validation": validation, "test": test}
    default = {"validation": opened.validation, "test": opened.test}
    wanted = {part: default[part] if value is None else value for part, value in given.items()}
    if len(opened.parts) == 1:
        (count,) = opened.parts.values()
        return random_splits(count, wanted["validation"], wanted["test"], seed)

    if "train" not in opened.parts:
        raise ValueError(
            f"split is needed: {opened.name} has the parts {', '.join(opened.parts)} but no train"
        )
    counts = dict(opened.parts)
    total = counts["train"]
    for part, value in given.items():
        if part in counts and value is not None:
            raise ValueError(
                f"{part}={value} makes no sense here: {opened.name} ({source}) has a {part} part "
                "of its own"
            )
        if part not in counts:
            counts[part] = amount(part, wanted[part], total)
            counts["train"] -= counts[part]
    if counts["train"] < 2:
        raise ValueError(
            f"validation={counts['validation']} and test={counts['test']} leave too few of the "
            f"{total} images of the train part of {opened.name}; at least 2 must remain"
        )
    if "validation" in opened.parts and "test" not in opened.parts:
        # Rows lie train, validation; the test images cut from the end of train lie between them.
        parts = fixed_splits(counts["train"], counts["test"], counts["validation"])
        return Splits(parts.train, parts.test, parts.validation)
    return fixed_splits(counts["train"], counts["validation"], counts["test"])


def _check_int(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
