import pickle

import numpy as np
import pytest

from ncprior.data import load_data


@pytest.fixture(params=["npy", "npz"])
def save(request, tmp_path):
    """array -> file that holds it, as .npy and as .npz."""

    def save(array):
        path = tmp_path / f"images.{request.param}"
        np.save(path, array) if request.param == "npy" else np.savez_compressed(path, x=array)
        return path

    return save


def both_ways(path, cache):
    """Load in memory and beyond the memory limit; check that they are the same; (n, c, h, w)."""
    in_memory, _ = load_data("array", path)
    mapped, _ = load_data("array", path, memory_limit=10, cache=cache)
    assert isinstance(mapped.images, np.memmap)
    assert np.array_equal(in_memory.images.numpy(), mapped.images)
    return in_memory.images.numpy()


def test_grey_bytes(save, pixels, tmp_path):
    images = both_ways(save(pixels), tmp_path / "cache")
    assert images.dtype == np.uint8 and np.array_equal(images, pixels[:, None])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("channels", [1, 3])
def test_channels_on_either_side(save, tmp_path, order, channels):
    shape = (10, channels, 6, 5)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    first = save(np.asarray(images, order=order))
    assert np.array_equal(both_ways(first, tmp_path / "a"), images)
    last = save(np.asarray(np.moveaxis(images, 1, 3), order=order))
    assert np.array_equal(both_ways(last, tmp_path / "b"), images)


def test_mapped_where_it_lies(tmp_path, pixels):
    np.save(tmp_path / "x.npy", pixels)
    data, _ = load_data("array", tmp_path / "x.npy", memory_limit=10)  # no cache needed
    assert isinstance(data.images, np.memmap) and data.image_shape == (1, 6, 5)


@pytest.mark.parametrize("kind", ["f2", "f4", ">f4", "f8"])
def test_floats_are_kept(save, tmp_path, kind):
    array = np.random.default_rng(0).random((10, 6, 5)).astype(kind)
    images = both_ways(save(array), tmp_path / "cache")
    assert images.dtype == np.float32 and np.array_equal(images[:, 0], array.astype(np.float32))


def test_black_and_white(save, tmp_path):
    array = np.random.default_rng(0).random((10, 6, 5)) < 0.5
    assert np.array_equal(both_ways(save(array), tmp_path / "cache")[:, 0], array * np.uint8(255))


def test_many_runs_of_rows(save, tmp_path, pixels, monkeypatch):
    monkeypatch.setattr("ncprior.data.arrays._STEP", 70)  # two rows and a bit
    assert np.array_equal(both_ways(save(pixels), tmp_path / "cache")[:, 0], pixels)
    array = np.ones((10, 6, 5))
    array[7, 2, 2] = np.nan
    with pytest.raises(ValueError, match="first in row 7"):
        load_data("array", save(array))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(300, dtype=np.int64).reshape(10, 6, 5), r"int64 \(.*from 0 to 299\): scale"),
        (np.zeros((10, 6, 5), np.complex64), "got complex64: scale"),
        (np.full((10, 6, 5), "a"), "got <U1"),
        (np.full((10, 6, 5), 200.0), r"got 200 to 200 in row 0: divide by 255"),
        (np.full((10, 6, 5), -1.0), "got -1 to -1 in row 0: rescale it"),
        (np.full((10, 6, 5), np.inf), "NaN or infinite values, first in row 0"),
        (np.ones((10, 6, 5), np.uint8), "no value above 1, where white is 255"),
        (np.zeros((10, 6), np.uint8), r"must have the shape.*got \(10, 6\)"),
        (np.zeros((0, 6, 5), np.uint8), "no axis empty"),
        (np.zeros((10, 6, 5, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((10, 2, 6, 5), np.uint8), "must have 1 or 3 channels"),
        (np.zeros((1, 6, 5), np.uint8), "at least 5 images.*got 1"),
    ],
)
@pytest.mark.parametrize("limit", [10, 2**20])
def test_bad_arrays(save, tmp_path, array, message, limit):
    with pytest.raises(ValueError, match=message):
        load_data("array", save(array), memory_limit=limit, cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


class Trap:
    """Unpickling it fails the test."""

    def __reduce__(self):
        return (pytest.fail, ("something was unpickled",))


def test_objects_are_never_unpickled(save, tmp_path):
    array = np.empty(10, dtype=object)
    array[:] = [Trap()] * 10
    with pytest.raises(ValueError, match="holds Python objects"):
        load_data("array", save(array))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(array))
    with pytest.raises(ValueError, match="Pickles are never loaded"):
        load_data("array", tmp_path / "x.pkl")


def test_key_of_an_npz(tmp_path, pixels):
    path = tmp_path / "x.npz"
    np.savez(path, images=pixels, labels=np.arange(10))
    assert np.array_equal(load_data("array", path)[0].images[:, 0].numpy(), pixels)
    np.savez(path, a=pixels, b=255 - pixels)
    with pytest.raises(ValueError, match=r"key is needed.*\['a', 'b'\]"):
        load_data("array", path)
    data, _ = load_data("array", path, key="b")
    assert np.array_equal(data.images[:, 0].numpy(), 255 - pixels)
    with pytest.raises(ValueError, match="key must be one of the arrays"):
        load_data("array", path, key="c")


def test_key_of_an_npy(tmp_path, pixels):
    np.save(tmp_path / "x.npy", pixels)
    with pytest.raises(ValueError, match=r"chooses an array of an \.npz"):
        load_data("array", tmp_path / "x.npy", key="a")


@pytest.mark.parametrize("limit", [10, 2**20])
@pytest.mark.parametrize("keep", [0, 3, 9, 100, -10])
def test_cut_short(save, pixels, tmp_path, keep, limit):
    path = save(pixels)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"cut short|empty file|neither|no readable header"):
        load_data("array", path, memory_limit=limit, cache=tmp_path / "cache")


def test_damaged_npz(tmp_path, pixels):
    path = tmp_path / "x.npz"
    np.savez(path, x=pixels)
    content = bytearray(path.read_bytes())
    content[300] ^= 255  # a pixel: the sum no longer fits
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cut short or damaged"):
        load_data("array", path)


def test_directory_is_no_array(tmp_path):
    with pytest.raises(ValueError, match=r"takes an \.npy or \.npz file"):
        load_data("array", tmp_path)
