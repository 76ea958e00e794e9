import gzip
import struct

import numpy as np
import pytest
import torch

from ncprior.data import load_data


def idx(images, kind=0x08):
    return (
        struct.pack(f">HBB{images.ndim}I", 0, kind, images.ndim, *images.shape) + images.tobytes()
    )


@pytest.fixture
def mnist_like(tmp_path):
    train = np.random.default_rng(1).integers(0, 256, (60, 4, 3), dtype=np.uint8)
    test = np.random.default_rng(2).integers(0, 256, (7, 4, 3), dtype=np.uint8)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train), mtime=0))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(test))
    return tmp_path, np.concatenate([train, test])


def test_directory_keeps_the_test_file(mnist_like):
    path, content = mnist_like
    data, splits = load_data("idx", path)
    assert np.array_equal(data.images[:, 0].numpy(), content)
    expected = [torch.arange(0, 50), torch.arange(50, 60), torch.arange(60, 67)]
    assert all(torch.equal(part, rows) for part, rows in zip(splits, expected, strict=True))
    assert [len(part) for part in load_data("idx", path, validation=0.5)[1]] == [30, 30, 7]
    assert [len(part) for part in load_data("idx", path, validation=4)[1]] == [56, 4, 7]


def test_mapped_equals_memory(mnist_like, tmp_path):
    path, content = mnist_like
    data, _ = load_data("idx", path, memory_limit=100, cache=tmp_path / "cache")
    assert isinstance(data.images, np.memmap)
    assert np.array_equal(data.images[:, 0], content)


@pytest.mark.parametrize("name", ["images.gz", "images"])
def test_single_file_is_split_at_random(tmp_path, pixels, name):
    content = idx(pixels)
    (tmp_path / name).write_bytes(
        gzip.compress(content, mtime=0) if name.endswith("gz") else content
    )
    data, splits = load_data("idx", tmp_path / name)
    assert np.array_equal(data.images[:, 0].numpy(), pixels)
    assert [len(part) for part in splits] == [7, 1, 2]


def test_own_test_file_cannot_be_overruled(mnist_like):
    with pytest.raises(ValueError, match="test=5 makes no sense here"):
        load_data("idx", mnist_like[0], test=5)


def test_validation_must_leave_something(mnist_like):
    with pytest.raises(ValueError, match=r"validation=59.*leave too few of the 60"):
        load_data("idx", mnist_like[0], validation=59)


def test_files_of_different_sizes(mnist_like, pixels):
    path, _ = mnist_like
    (path / "t10k-images-idx3-ubyte").write_bytes(idx(pixels))
    with pytest.raises(ValueError, match="images of different sizes"):
        load_data("idx", path)


def test_directory_without_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor t10k"):
        load_data("idx", tmp_path)


GOOD = np.random.default_rng(3).integers(0, 256, (10, 4, 3), dtype=np.uint8)
PACKED = gzip.compress(idx(GOOD), mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is an empty file"),
        (gzip.compress(b"", mtime=0), "is not an idx file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(20), "is not an idx file: it begins with"),
        (idx(np.arange(9, dtype=np.uint8)), r"got type 8 with 1 axes \(labels, perhaps\)"),
        (idx(GOOD.astype(">f4"), kind=0x0D), "got type 13"),
        (idx(GOOD)[:10], "header has 10 of 16 bytes"),
        (idx(GOOD[:0]), "has no images: 0 of 4x3"),
        (idx(GOOD[:1]), "at least 5 images"),
        (idx(GOOD)[:-1], "cut short or damaged: 10 images of 4x3 pixels take 136 bytes"),
        (idx(GOOD) + b"x", "the file has 137"),
        (gzip.compress(idx(GOOD)[:-1], mtime=0), "must hold 120 bytes of pixels.*only 119"),
        (gzip.compress(idx(GOOD) + b"x", mtime=0), "must hold 120 bytes.*has more"),
        (PACKED[:-20], "its gzip data has no end"),
        (PACKED[:12], "its gzip data has no end"),
        (PACKED[:-8] + bytes(8), "damaged: its gzip data is wrong"),
        (PACKED[:10] + bytes([255] * 40) + PACKED[50:], "damaged: its gzip data is wrong"),
        (gzip.compress(struct.pack(">HBB3I", 0, 8, 3, 2**31, 999, 999), mtime=0), "unpack to"),
    ],
)
def test_bad_files(tmp_path, content, message):
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data("idx", tmp_path / "bad")


def labels_idx(labels):
    return struct.pack(">HBBI", 0, 8, 1, len(labels)) + bytes(labels)


def test_labels_beside_the_images(mnist_like):
    path, _ = mnist_like
    train, test = [i % 10 for i in range(60)], [9, 8, 7, 6, 5, 4, 3]
    (path / "train-labels-idx1-ubyte").write_bytes(labels_idx(train))
    assert load_data("idx", path)[0].labels is None  # those of the test file are missing
    (path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels_idx(test), mtime=0))
    data, _ = load_data("idx", path)
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == train + test
    single, _ = load_data("idx", path / "train-images-idx3-ubyte.gz")
    assert single.labels.tolist() == train


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (labels_idx([1] * 9), "label for each of 60 images; its header says 9, and it has 9"),
        (labels_idx([1] * 60)[:-1], "its header says 60, and it has 59"),
        (idx(GOOD), r"must hold uint8 labels \(magic 0 0 8 1\)"),
    ],
)
def test_bad_labels(mnist_like, content, message):
    path = mnist_like[0] / "train-images-idx3-ubyte.gz"
    (mnist_like[0] / "train-labels-idx1-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_data("idx", path)
