import numpy as np
import torch
from sklearn.datasets import load_digits

from ncprior.data import load_data


def test_digits_are_those_of_scikit_learn():
    data, splits = load_data()
    assert (data.name, len(data), data.image_shape) == ("digits", 1797, (1, 8, 8))
    assert [len(part) for part in splits] == [1350, 97, 350]
    expected = np.round(load_digits().images * 255 / 16).astype(np.uint8)
    assert np.array_equal(data.images[:, 0].numpy(), expected)
    assert data.raw(torch.arange(1797)).max() == 1
    assert np.array_equal(data.labels.numpy(), load_digits().target)
