"""Hugging Face data sets of images: parquet files at hand, or by name through `datasets`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dataset import Images
from .pictures import Picture, Size, check_picture_options, read_pictures
from .source import Source, signature
from .store import MEMORY_LIMIT

_PARTS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
_NAMES = ("image", "img")  # of a column, where the types leave a choice
_LABELS = ("label", "labels")  # of a column of whole numbers
_ROWS = 256  # read at a time: one encoded picture may be a megabyte


class _Table(NamedTuple):
    """Rows with one column of encoded pictures."""

    name: str
    parts: dict[str, int]
    pictures: Callable[[], Iterator[Picture]]
    signature: dict[str, object]
    labels: Callable[[], Tensor | None]


def open_hub(
    path: Path | str,
    *,
    column: str | None = None,
    split: str | None = None,
    image_size: Size = None,
    crop: int | None = None,
    channels: int | None = None,
    memory_limit: int = MEMORY_LIMIT,
    cache: str | None = None,
) -> Source:
    """Look at a data set of the Hugging Face hub, or at parquet files laid out like one.

    Without `split`, the parts that the data set comes with (train, validation, test) are kept.
    With it, only that part is read, and split at random. A column of whole numbers named label or
    labels holds the labels.

    Args:
        path: A parquet file, a directory of them (parts are told by names such as
            train-00000-of-00005.parquet), or the name of a data set on the hub, as a str.
        column: The column with the images; None finds it if there is no doubt.
        split: The part to read. For a name on the hub, anything that `datasets` understands.
        image_size: Height and width in pixels, or one number for both; None keeps the size.
        crop: Side in pixels of the square to cut at the centre before that; None cuts nothing.
        channels: 1 or 3; None takes that of the first picture and insists on it.
        memory_limit: Largest size of the images in bytes to hold in memory.
        cache: Directory for a mapped file if they are larger.

    Raises:
        ModuleNotFoundError: pyarrow or `datasets` is not installed; they are in the extra `data`.
        TypeError, ValueError: a wrong option, no such column or part, a file that is not parquet;
            when read: a row without an image, and as for `read_pictures`.
    """
    check_picture_options(image_size, crop, channels)
    table = _local(path, column, split) if isinstance(path, Path) else _remote(path, column, split)
    count = sum(table.parts.values())
    if count == 0:
        raise ValueError(f"path: {path} has no rows")
    options = {"column": column, "image_size": image_size, "crop": crop, "channels": channels}

    def read() -> Images:
        return read_pictures(
            table.pictures,
            count,
            image_size=image_size,
            crop=crop,
            channels=channels,
            name=table.name,
            signature={**table.signature, "read": {k: repr(v) for k, v in options.items()}},
            memory_limit=memory_limit,
            cache=cache,
        )

    return Source(table.name, table.parts, read, labels=table.labels)


def _local(path: Path, column: str | None, split: str | None) -> _Table:
    parquet = _parquet()
    groups = _group(path, split)
    readers = {}
    for files in groups.values():
        for file in files:
            try:
                readers[file] = parquet.ParquetFile(file)
            except (ValueError, OSError) as error:  # pyarrow's ArrowInvalid is a ValueError
                raise ValueError(f"path: {file} is not a readable parquet file: {error}") from error
    files = list(readers)
    column = _pick(readers[files[0]].schema_arrow, column, files[0])
    for file, reader in readers.items():
        _pick(reader.schema_arrow, column, file)
    counts = {file: reader.metadata.num_rows for file, reader in readers.items()}
    for reader in readers.values():
        reader.close()

    def pictures() -> Iterator[Picture]:
        for file in files:
            if counts[file]:
                yield from _pictures_of(file, column)

    parts = {part: sum(counts[file] for file in group) for part, group in groups.items()}
    return _Table(
        path.name if path.is_dir() else path.stem,
        {part: count for part, count in parts.items() if count},
        pictures,
        signature(files),
        lambda: _labels_of([file for file in files if counts[file]]),
    )


def _group(path: Path, split: str | None) -> dict[str, list[Path]]:
    """Sort parquet files into parts by their names; in the order train, validation, test."""
    if path.is_file():
        if split is not None:
            raise ValueError(f"split={split!r} makes no sense for one file, {path}")
        return {"all": [path]}
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*.parquet")):
        found.setdefault(_part_of(file.relative_to(path)), []).append(file)
    if not found:
        raise ValueError(f"path: {path} has no .parquet file in it or below it")
    known = [part for part in ("train", "validation", "test") if part in found]
    if split is not None:
        if _PARTS.get(split) not in known:
            raise ValueError(f"split must be one of the parts of {path}, {known}, got {split!r}")
        return {_PARTS[split]: found[_PARTS[split]]}
    if not known:
        return {"all": found[""]}
    if "" in found:
        raise ValueError(
            f"path: in {path}, {found[''][0].name} is not named after a part, while others are "
            f"({', '.join(known)}): pass split=<part>, or one file as path"
        )
    return {part: found[part] for part in known}


def _part_of(relative: Path) -> str:
    """Tell the part from the first word of the file's name or of a directory above; else ''."""
    for component in reversed(relative.parts):
        word = re.split(r"[-_.]", component.lower())[0]
        if word in _PARTS:
            return _PARTS[word]
    return ""


def _pick(schema: Any, column: str | None, file: Path) -> str:
    """Find the column of pictures: a struct with bytes, or bytes."""
    import pyarrow

    def encoded(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and encoded(kind.field(index).type)
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    if column is not None:
        if column not in schema.names:
            raise ValueError(f"column must be one of {schema.names} in {file}, got {column!r}")
        kind = schema.field(column).type
        if not encoded(kind):
            raise ValueError(
                f"column {column!r} of {file} must have encoded images (bytes, or a struct with "
                f"bytes), got {kind}"
            )
        return column
    return _only([field.name for field in schema if encoded(field.type)], schema.names, str(file))


def _only(likely: Sequence[str], names: Sequence[str], label: str) -> str:
    if len(likely) > 1:
        likely = [name for name in likely if name in _NAMES]
    if len(likely) != 1:
        raise ValueError(
            f"column is needed: {label} has the columns {list(names)}, and "
            f"{'several' if likely else 'none'} of them can be told to be the images"
        )
    return likely[0]


def _pictures_of(file: Path, column: str) -> Iterator[Picture]:
    row = 0
    with _parquet().ParquetFile(file) as reader:
        for batch in reader.iter_batches(batch_size=_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield _picture(value, f"row {row} of {file}")
                row += 1


def _labels_of(files: Sequence[Path]) -> Tensor | None:
    """The labels in parquet files; None where a file has none, or a row lacks its own."""
    import pyarrow

    found: list[int | None] = []
    for file in files:
        with _parquet().ParquetFile(file) as reader:
            schema = reader.schema_arrow
            whole = [name for name in _LABELS if name in schema.names]
            whole = [name for name in whole if pyarrow.types.is_integer(schema.field(name).type)]
            if not whole:
                return None
            found += reader.read(columns=whole[:1]).column(0).to_pylist()
    return _known(found)


def _known(labels: list[int | None]) -> Tensor | None:
    """Labels as a tensor, unless some are missing, which the hub writes as null or -1."""
    known = [label for label in labels if label is not None and label >= 0]
    return torch.tensor(known) if len(known) == len(labels) else None


def _picture(value: Any, label: str) -> Picture:
    data = value.get("bytes") if isinstance(value, dict) else value
    if data is None:
        path = value.get("path") if isinstance(value, dict) else None
        raise ValueError(
            f"{label} has no image"
            + (f", only the path {path}: save the bytes with it" if path else "")
        )
    return label, data


def _remote(name: str, column: str | None, split: str | None) -> _Table:
    datasets = _datasets()
    loaded = datasets.load_dataset(name, split=split)
    if isinstance(loaded, dict):
        unknown = sorted(set(loaded) - {"train", "validation", "test"})
        if unknown or "train" not in loaded:
            raise ValueError(
                f"split is needed: {name} has the parts {sorted(loaded)}; pass split=<one>"
            )
        tables = {part: loaded[part] for part in ("train", "validation", "test") if part in loaded}
    else:
        tables = {"all": loaded}

    features = next(iter(tables.values())).features
    if column is None:
        likely = [key for key, kind in features.items() if isinstance(kind, datasets.Image)]
        column = _only(likely, list(features), name)
    elif not isinstance(features.get(column), datasets.Image):
        raise ValueError(f"column must be a column of images of {name}, got {column!r}")
    of_labels = [key for key in _LABELS if getattr(features.get(key), "dtype", "") == "int64"]
    labelled = [table.select_columns(of_labels[:1]) for table in tables.values() if of_labels]
    tables = {
        part: table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        for part, table in tables.items()
    }

    def pictures() -> Iterator[Picture]:
        for part, table in tables.items():
            for row, record in enumerate(table):
                value, label = record[column], f"row {row} of {name} ({part})"
                if value and value.get("bytes") is None and value.get("path"):
                    yield label, Path(value["path"])  # `datasets` may keep files where they are
                else:
                    yield _picture(value, label)

    files = [Path(f["filename"]) for table in tables.values() for f in table.cache_files]
    return _Table(
        name,
        {part: len(table) for part, table in tables.items() if len(table)},
        pictures,
        {"hub": name, "split": split, **signature(files)},
        lambda: _known([row[of_labels[0]] for table in labelled for row in table] or [None]),
    )


def _parquet() -> ModuleType:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ModuleNotFoundError(
            "reading parquet files needs pyarrow: pip install 'ncprior[data]'"
        ) from error
    return parquet


def _datasets() -> ModuleType:
    try:
        import datasets  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise ModuleNotFoundError(
            "data sets by name from the hub need `datasets`: pip install 'ncprior[data]'"
        ) from error
    return datasets
