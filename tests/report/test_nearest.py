"""Samples beside their nearest training images."""

import torch

from ncprior.data import ImageDataset
from ncprior.report import nearest


def test_each_sample_is_followed_by_its_nearest_rows(rng, monkeypatch):
    monkeypatch.setattr(nearest, "PART", 7)  # read in parts
    images = torch.rand(40, 1, 4, 4, generator=rng)
    data = ImageDataset(images)
    rows = torch.arange(20)
    samples = images[[3, 17, 30]] * 0.999  # the last is of an image that is not among the rows
    shown = nearest.beside_nearest(samples, data, rows, 2).view(3, 3, 1, 4, 4)
    assert torch.equal(shown[:, 0], samples)
    assert torch.equal(shown[:2, 1], images[[3, 17]])
    distances = torch.cdist(samples.flatten(1), images[:20].flatten(1))
    assert torch.equal(shown[:, 1:], images[distances.argsort(1)[:, :2]])


def test_no_more_neighbours_than_there_are(rng):
    data = ImageDataset(torch.rand(5, 1, 4, 4, generator=rng))
    shown = nearest.beside_nearest(torch.rand(2, 1, 4, 4, generator=rng), data, torch.arange(3), 5)
    assert shown.shape == (2 * 4, 1, 4, 4)
