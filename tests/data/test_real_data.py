"""The real data sets, where they are at hand; see their README for where the numbers are from."""

import numpy as np
import pytest
import torch

from ncprior.data import load_data

pytestmark = pytest.mark.data


def mean_and_std(data, rows):
    images = data.raw(rows)
    return float(images.mean()), float(images.std(correction=0))


@pytest.mark.parametrize(
    ("name", "mean", "std"), [("mnist", 0.1307, 0.3081), ("fashion_mnist", 0.2860, 0.3530)]
)
def test_idx(real_data, name, mean, std):
    data, splits = load_data("idx", real_data(name))
    assert (len(data), data.image_shape) == (70_000, (1, 28, 28))
    assert torch.equal(splits.validation, torch.arange(50_000, 60_000))
    assert torch.equal(splits.test, torch.arange(60_000, 70_000))
    each = torch.bincount(data.labels[splits.test])  # the labels of MNIST's test images are known
    assert each.tolist() == (
        [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009] if name == "mnist" else [1000] * 10
    )
    train_file = torch.cat([splits.train, splits.validation])
    # The published numbers have four digits.
    assert mean_and_std(data, train_file) == pytest.approx((mean, std), abs=5e-5)


def test_dynamic_binarisation_keeps_the_mean(real_data):
    data, splits = load_data("idx", real_data("mnist"), binarize="dynamic")
    drawn = data.batch(splits.test, generator=torch.Generator().manual_seed(0))
    grey = data.raw(splits.test).double()
    # 5 standard errors of a sum of independent Bernoulli draws; 1 seed in 1.7 million fails.
    error = (grey * (1 - grey)).sum().sqrt()
    assert abs(drawn.double().sum() - grey.sum()) < 5 * error


def test_cifar10_shard(real_data):
    pytest.importorskip("pyarrow")
    data, splits = load_data("hub", real_data("cifar10/test-00000-of-00001.parquet"))
    assert (len(data), data.image_shape) == (10_000, (3, 32, 32))
    assert [len(part) for part in splits] == [8000, 1000, 1000]
    assert torch.bincount(data.labels).tolist() == [1000] * 10
    # The 10,000 test images are a sample like the training images, whose means are given: their
    # standard deviations between images are below 0.16, so 5 standard errors are 0.008 each,
    # beside a hundredth of that for the 50,000.
    mean = data.raw(torch.arange(10_000)).mean((0, 2, 3)).tolist()
    assert mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=0.009)


def test_lfw(real_data):
    pytest.importorskip("pyarrow")
    data, _ = load_data(
        "hub", real_data("lfw_faces/lfw_crops128_3000.parquet"), crop=96, image_size=32
    )
    assert (len(data), data.image_shape) == (3000, (3, 32, 32))


def test_frey_faces(real_data):
    path = real_data("frey_faces/frey_faces.npz")
    data, _ = load_data("array", path)
    assert (data.name, len(data), data.image_shape) == ("frey_faces", 1965, (1, 28, 20))
    assert (int(data.images.min()), int(data.images.max())) == (8, 238)
    with np.load(path, allow_pickle=False) as archive:
        assert np.array_equal(data.images[:, 0].numpy(), archive["images"])


def test_omniglot_key(real_data):
    path = real_data("omniglot/omniglot_105_packed.npz")
    with pytest.raises(ValueError, match=r"alphabet.* must have the shape .* got \(32460,\)"):
        load_data("array", path, key="alphabet")
