import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from ncprior.data import load_data

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def encoded(picture):
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "png")
    return stream.getvalue()


def rows_of(pictures):
    return [{"bytes": encoded(picture), "path": None} for picture in pictures]


def write(path, pictures, column="img"):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({column: rows_of(pictures), "label": list(range(len(pictures)))})
    parquet.write_table(table, path)
    return path


@pytest.fixture
def colours():
    return np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)


def stored(data):
    return np.asarray(data.images).transpose(0, 2, 3, 1)


def test_one_file(tmp_path, colours):
    path = write(tmp_path / "faces.parquet", colours)
    data, splits = load_data("hub", path)
    assert data.name == "faces" and [len(part) for part in splits] == [16, 2, 2]
    assert np.array_equal(stored(data), colours) and data.labels.tolist() == list(range(20))
    mapped, _ = load_data("hub", path, memory_limit=10, cache=tmp_path / "cache")
    assert isinstance(mapped.images, np.memmap) and np.array_equal(stored(mapped), colours)


def test_column_of_plain_bytes(tmp_path, pixels):
    table = pa.table({"png": [encoded(picture) for picture in pixels]})
    parquet.write_table(table, tmp_path / "x.parquet")
    data, _ = load_data("hub", tmp_path / "x.parquet")
    assert np.array_equal(data.images[:, 0].numpy(), pixels) and data.labels is None


@pytest.mark.parametrize("labels", [[3, None] + [0] * 18, [-1] * 20, [0.5] * 20, ["a"] * 20])
def test_columns_that_are_not_all_labels(tmp_path, colours, labels):
    table = pa.table({"image": rows_of(colours), "label": labels})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert load_data("hub", tmp_path / "x.parquet")[0].labels is None


def test_directory_keeps_its_parts(tmp_path, colours):
    write(tmp_path / "d" / "test-00000-of-00001.parquet", colours[15:])
    write(tmp_path / "d" / "train-00000-of-00002.parquet", colours[:7])
    write(tmp_path / "d" / "train-00001-of-00002.parquet", colours[7:15])
    data, splits = load_data("hub", tmp_path / "d")
    assert np.array_equal(stored(data), colours)
    assert data.labels.tolist() == [*range(7), *range(8), *range(5)]  # in the order of rows
    assert [part.tolist() for part in splits] == [
        list(range(13)),
        [13, 14],
        list(range(15, 20)),
    ]
    only, splits = load_data("hub", tmp_path / "d", split="train")
    assert np.array_equal(stored(only), colours[:15])
    assert [len(part) for part in splits] == [11, 2, 2]
    with pytest.raises(ValueError, match=r"split must be one of.*\['train', 'test'\], got 'dev'"):
        load_data("hub", tmp_path / "d", split="dev")


def test_validation_part(tmp_path, colours):
    write(tmp_path / "train" / "0000.parquet", colours[:14])
    write(tmp_path / "validation" / "0000.parquet", colours[14:])
    data, splits = load_data("hub", tmp_path, test=3)
    assert [part.tolist() for part in splits] == [
        list(range(11)),
        list(range(14, 20)),
        [11, 12, 13],
    ]
    with pytest.raises(ValueError, match="validation=3 makes no sense here"):
        load_data("hub", tmp_path, validation=3)
    write(tmp_path / "test" / "0000.parquet", colours[:5])
    data, splits = load_data("hub", tmp_path)
    assert [len(part) for part in splits] == [14, 6, 5]
    assert np.array_equal(stored(data), np.concatenate([colours, colours[:5]]))


def test_directory_without_parts(tmp_path, colours):
    write(tmp_path / "b.parquet", colours[10:])
    write(tmp_path / "a.parquet", colours[:10])
    data, _ = load_data("hub", tmp_path)
    assert np.array_equal(stored(data), colours)
    write(tmp_path / "train.parquet", colours)
    with pytest.raises(ValueError, match=r"a\.parquet is not named after a part"):
        load_data("hub", tmp_path)


def test_column_choice(tmp_path, colours):
    path = tmp_path / "x.parquet"
    two = {"left": rows_of(colours), "right": rows_of(colours[::-1]), "n": [1] * 20}
    parquet.write_table(pa.table(two), path)
    with pytest.raises(ValueError, match="column is needed"):
        load_data("hub", path)
    assert np.array_equal(stored(load_data("hub", path, column="right")[0]), colours[::-1])
    with pytest.raises(ValueError, match="column must be one of"):
        load_data("hub", path, column="middle")
    with pytest.raises(ValueError, match=r"column 'n' .* must have encoded images"):
        load_data("hub", path, column="n")
    parquet.write_table(pa.table({"n": [1] * 20}), path)
    with pytest.raises(ValueError, match="none of them"):
        load_data("hub", path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "row 3 of .*x.parquet has no image"),
        ({"bytes": None, "path": "a.png"}, "row 3 .* only the path a.png"),
        ({"bytes": b"junk", "path": None}, "row 3 of .* cannot be read as an image"),
        ({"bytes": b"", "path": None}, "row 3 of .* cannot be read as an image"),
    ],
)
def test_bad_rows(tmp_path, colours, value, message):
    rows = rows_of(colours)
    rows[3] = value
    parquet.write_table(pa.table({"image": rows}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        load_data("hub", tmp_path / "x.parquet")


def test_bad_files(tmp_path, colours):
    path = write(tmp_path / "x.parquet", colours)
    with pytest.raises(ValueError, match="makes no sense for one file"):
        load_data("hub", path, split="train")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a readable parquet file"):
        load_data("hub", path)
    write(path, colours[:1])
    with pytest.raises(ValueError, match=r"at least 5 images.*got 1"):
        load_data("hub", path)
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    with pytest.raises(ValueError, match="has no rows"):
        load_data("hub", path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"has no \.parquet file"):
        load_data("hub", tmp_path / "empty")


def test_missing_packages(tmp_path, colours, monkeypatch):
    path = write(tmp_path / "x.parquet", colours)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ncprior\[data\]'"):
        load_data("hub", path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'ncprior\[data\]'"):
        load_data("hub", "owner/name")


class FakeTable:
    """As much of `datasets.Dataset` as is used."""

    cache_files = ()

    def __init__(self, rows, decode=True, column="image"):
        self.rows, self.column = rows, column
        whole = types.SimpleNamespace(dtype="int64")
        self.features = {"label": whole, "image": FakeImage(decode)}

    def __len__(self):
        return len(self.rows)

    def __iter__(self):
        if self.column == "label":
            return iter({"label": i % 3} for i in range(len(self.rows)))
        assert not self.features["image"].decode
        return iter({"image": row} for row in self.rows)

    def select_columns(self, columns):
        return FakeTable(self.rows, self.features["image"].decode, *columns)

    def cast_column(self, column, kind):
        assert column == "image"
        return FakeTable(self.rows, kind.decode)


class FakeImage:
    def __init__(self, decode=True):
        self.decode = decode


@pytest.fixture
def fake_hub(monkeypatch, colours):
    """A stand-in for the package `datasets` with one data set of two parts."""
    parts = {"test": FakeTable(rows_of(colours[15:])), "train": FakeTable(rows_of(colours[:15]))}

    def load_dataset(name, split=None):
        assert name == "owner/name"
        return dict(parts) if split is None else parts[split]

    module = types.SimpleNamespace(load_dataset=load_dataset, Image=FakeImage)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return parts


def test_name_on_the_hub(fake_hub, colours):
    data, splits = load_data("hub", "owner/name")
    assert data.name == "owner/name" and np.array_equal(stored(data), colours)
    assert torch.equal(splits.test, torch.arange(15, 20))
    assert data.labels.tolist() == [*(i % 3 for i in range(15)), *(i % 3 for i in range(5))]
    only, _ = load_data("hub", "owner/name", split="train", image_size=3, channels=1)
    assert len(only) == 15 and only.image_shape == (1, 3, 3)
    with pytest.raises(ValueError, match="must be a column of images"):
        load_data("hub", "owner/name", column="label")


def test_unusual_parts_on_the_hub(fake_hub):
    fake_hub["extra"] = fake_hub["train"]
    with pytest.raises(ValueError, match=r"split is needed: .*\['extra', 'test', 'train'\]"):
        load_data("hub", "owner/name")
