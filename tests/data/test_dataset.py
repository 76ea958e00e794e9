import numpy as np
import pytest
import torch

from ncprior.data import ImageDataset, as_data, random_splits

ROWS = torch.tensor([3, 0, 3, 9])


@pytest.fixture
def images(pixels):
    return torch.from_numpy(pixels).unsqueeze(1)  # (10, 1, 6, 5)


@pytest.fixture
def mapped(images, tmp_path):
    np.save(tmp_path / "images.npy", images.numpy())
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_grey_batch_is_exact(images):
    data = ImageDataset(images, name="grey")
    assert len(data) == 10 and data.image_shape == (1, 6, 5) and not data.redrawn
    batch = data.batch(ROWS)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, images[ROWS].float() / 255)
    assert torch.equal(batch, data.raw(ROWS))
    assert "grey" in repr(data) and "1x6x5" in repr(data)


def test_floats_are_kept_as_they_are():
    images = torch.rand(4, 3, 2, 2)
    data = ImageDataset(images)
    batch = data.batch(torch.tensor([1]))
    assert torch.equal(batch, images[[1]])
    batch.zero_()  # a batch is the caller's own
    assert images[1].abs().sum() > 0


@pytest.mark.parametrize("options", [{}, {"binarize": "dynamic"}, {"binarize": 7}, {"flip": True}])
def test_mapped_file_equals_memory(images, mapped, options):
    in_memory = ImageDataset(images, **options)
    from_file = ImageDataset(mapped, **options)
    assert torch.equal(
        in_memory.batch(ROWS, generator=seeded()), from_file.batch(ROWS, generator=seeded())
    )
    assert torch.equal(in_memory.raw(ROWS), from_file.raw(ROWS))


def test_dynamic_is_drawn_anew(images):
    data = ImageDataset(images, binarize="dynamic")
    assert data.redrawn
    generator = seeded()
    first, second = data.batch(ROWS, generator=generator), data.batch(ROWS, generator=generator)
    assert not torch.equal(first, second)
    assert torch.equal(first, data.batch(ROWS, generator=seeded()))
    assert torch.equal(data.raw(ROWS), images[ROWS].float() / 255)


def test_static_does_not_depend_on_the_batch(images):
    data = ImageDataset(images, binarize=7)
    assert not data.redrawn
    whole = data.batch(torch.arange(10))
    assert set(whole.unique().tolist()) == {0.0, 1.0}
    for row in range(10):
        assert torch.equal(data.batch(torch.tensor([row]))[0], whole[row])
    assert torch.equal(data.batch(ROWS), whole[ROWS])
    assert torch.equal(ImageDataset(images[:4], binarize=7).batch(torch.arange(4)), whole[:4])
    assert not torch.equal(ImageDataset(images, binarize=8).batch(torch.arange(10)), whole)
    assert torch.equal(data.raw(ROWS), images[ROWS].float() / 255)


def test_flip_mirrors_half_of_the_images(images):
    data = ImageDataset(images, flip=True)
    assert data.redrawn
    rows = torch.full((10_000,), 2)
    batch = data.batch(rows, generator=seeded())
    straight = images[2].float() / 255
    mirrored = (batch == straight.flip(-1)).flatten(1).all(1)
    assert torch.equal((batch == straight).flatten(1).all(1), ~mirrored)
    # 5 standard errors of a fair coin: 0.5 / sqrt(10,000) each; 1 seed in 1.7 million fails.
    assert abs(mirrored.float().mean() - 0.5) < 5 * 0.005


def test_flip_of_fixed_binary_images(images):
    data = ImageDataset(images, flip=True, binarize=7)
    straight = ImageDataset(images, binarize=7).batch(torch.tensor([2]))
    batch = data.batch(torch.full((64,), 2), generator=seeded())
    same = (batch == straight).flatten(1).all(1)
    other = (batch == straight.flip(-1)).flatten(1).all(1)
    assert (same | other).all() and same.any() and other.any()


@pytest.mark.parametrize("options", [{"binarize": "dynamic"}, {"flip": True}])
def test_generator_is_needed(images, options):
    with pytest.raises(ValueError, match="generator is needed"):
        ImageDataset(images, **options).batch(ROWS)


@pytest.mark.parametrize("rows", [[10], [-1], [0, 11]])
def test_rows_out_of_range(images, mapped, rows):
    for source in (images, mapped):
        with pytest.raises(IndexError, match="between 0 and 9"):
            ImageDataset(source).batch(torch.tensor(rows))


@pytest.mark.parametrize("rows", [torch.tensor(3), torch.tensor([[3]]), torch.tensor([0.5])])
def test_rows_of_the_wrong_kind(images, rows):
    with pytest.raises(ValueError, match="rows must be int64"):
        ImageDataset(images).raw(rows)


def test_no_rows(images):
    none = torch.empty(0, dtype=torch.int64)
    for binarize in (None, "dynamic", 3):
        batch = ImageDataset(images, binarize=binarize).batch(none, generator=seeded())
        assert batch.shape == (0, 1, 6, 5)


@pytest.mark.parametrize("bad", ["static", True, 0.5])
def test_binarize_of_the_wrong_kind(images, bad):
    with pytest.raises(TypeError, match="binarize must be"):
        ImageDataset(images, binarize=bad)


def test_other_bad_options(images):
    with pytest.raises(ValueError, match=r"binarize as a seed.*got -1"):
        ImageDataset(images, binarize=-1)
    with pytest.raises(TypeError, match="flip must be"):
        ImageDataset(images, flip="yes")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (np.zeros((2, 1, 3, 3), np.uint8), TypeError, "torch.from_numpy"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.float64), TypeError, "got torch.float64"),
        (torch.zeros(2, 3, 3), ValueError, r"got \(2, 3, 3\)"),
        (torch.zeros(0, 1, 3, 3), ValueError, "no axis empty"),
        (torch.full((2, 1, 3, 3), 1.5), ValueError, "got 1.5 to 1.5"),
        (torch.full((2, 1, 3, 3), float("nan")), ValueError, "got NaN in 2 of 2"),
        (torch.full((2, 1, 3, 3), 9.0), ValueError, r"in \[0, 1\], got 9 to 9; divide by 255"),
        (torch.full((2, 1, 3, 3), -1.0), ValueError, r"in \[0, 1\], got -1 to -1; bring them"),
    ],
)
def test_bad_images(bad, error, message):
    with pytest.raises(error, match=message):
        ImageDataset(bad)


def test_labels(images):
    labels = torch.arange(10)
    assert ImageDataset(images, labels=labels).labels is labels
    assert ImageDataset(images).labels is None


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.arange(9), ValueError, r"labels must have the shape \(10,\), got \(9,\)"),
        (torch.arange(-1, 9), ValueError, "must not be negative, got -1"),
        (torch.zeros(10), TypeError, "int64 tensor, got torch.float32"),
        ([0] * 10, TypeError, "int64 tensor, got <class 'list'>"),
    ],
)
def test_bad_labels(images, labels, error, message):
    with pytest.raises(error, match=message):
        ImageDataset(images, labels=labels)


def test_what_is_no_images_or_no_splits(images):
    with pytest.raises(TypeError, match="got a list; gather what a loader gives"):
        as_data([images])
    with pytest.raises(TypeError, match=r"must be ncprior.Splits.* got a tuple"):
        as_data(images, tuple(random_splits(10, 1, 2, 0)))


def test_digest_tells_data_apart(images):
    digest = ImageDataset(images).digest()
    assert digest == ImageDataset(images.clone(), name="other", binarize="dynamic").digest()
    changed = images.clone()
    changed[9, 0, 0, 0] ^= 1
    assert len({digest, ImageDataset(changed).digest(), ImageDataset(images[:9]).digest()}) == 3
