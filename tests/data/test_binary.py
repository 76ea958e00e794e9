import math

import numpy as np
import torch

from ncprior.data import binary
from ncprior.data.binary import draw_binary, draw_bits, unpack_bits

EVERY = torch.arange(256, dtype=torch.uint8)


def check_law(means, p, n):
    """Compare the means of n draws with each probability of p."""
    # 5 standard errors for each of the (at most 256) greys: 1 seed in 7,000 fails by chance.
    # The sum of squared deviations is chi-square with as many degrees k, hence variance 2 k; it
    # sees a bias of 1 part in 256 (ties always read as 0) at n = 200,000: 50 of its 22s.
    error = (p * (1 - p) / n).sqrt()
    z = (means - p)[error > 0] / error[error > 0]
    assert z.abs().max() < 5
    assert abs(z.square().sum() - len(z)) < 5 * math.sqrt(2 * len(z))


def test_law_of_every_grey():
    generator = torch.Generator().manual_seed(0)
    rounds, rows = 10, 20_000
    images = EVERY.expand(rows, 256).contiguous()
    means = sum(draw_binary(images, generator=generator).double().mean(0) for _ in range(rounds))
    means /= rounds
    assert means[0] == 0 and means[255] == 1
    check_law(means, EVERY.double() / 255, rounds * rows)


def test_law_of_float_greys():
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([0.0, 1e-3, 0.1, 0.5, 0.9, 1.0])
    means = draw_binary(p.expand(200_000, 6), generator=generator).double().mean(0)
    assert means[0] == 0 and means[5] == 1
    check_law(means, p.double(), 200_000)


def test_law_of_fixed_draw():
    images = EVERY.expand(20_000, 256).reshape(-1, 1, 16, 16)
    bits = draw_bits(images, generator=torch.Generator().manual_seed(2))
    means = unpack_bits(bits, (1, 16, 16)).double().mean(0).flatten()
    assert means[0] == 0 and means[255] == 1
    check_law(means, EVERY.double() / 255, 20_000)


def test_first_byte_decides_exactly(monkeypatch):
    """Over all 256 bytes a grey p gives exactly p ones, and one tie that goes to the rest."""
    every_pair = EVERY.repeat_interleave(256)  # greys, each with all bytes
    monkeypatch.setattr(binary, "random_bytes", lambda count, generator: EVERY.repeat(256))
    for rest, tie in [(0.0, EVERY > 0), (1 - 2**-24, EVERY == 255)]:
        monkeypatch.setattr(torch, "rand", lambda shape, rest=rest, **_: torch.full(shape, rest))
        ones = draw_binary(every_pair, generator=torch.Generator()).view(256, 256).sum(1)
        assert torch.equal(ones, EVERY + tie.float())


def testrandom_bytes_are_uniform_and_independent():
    count = 2_560_003  # not a multiple of 8
    bytes_ = binary.random_bytes(count, torch.Generator().manual_seed(3)).numpy()
    assert bytes_.shape == (count,)
    # Chi-square with 255 (then 65,535) degrees of freedom, 5 standard deviations either side.
    pairs = bytes_[:-1].astype(np.int64) * 256 + bytes_[1:]
    for values, cells in [(bytes_, 256), (pairs, 65_536)]:
        expected = len(values) / cells
        chi = ((np.bincount(values, minlength=cells) - expected) ** 2 / expected).sum()
        assert abs(chi - (cells - 1)) < 5 * math.sqrt(2 * cells)


def test_seed_decides_and_shape_stays():
    images = torch.randint(0, 256, (3, 2, 5, 7), dtype=torch.uint8)
    kept = images.clone()
    draws = [
        draw_binary(images, generator=torch.Generator().manual_seed(seed)) for seed in (4, 4, 5)
    ]
    assert draws[0].shape == images.shape and draws[0].dtype == torch.float32
    assert set(draws[0].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(images, kept)


def test_fixed_draw_does_not_depend_on_how_many():
    images = torch.randint(0, 256, (9, 1, 3, 5), dtype=torch.uint8)
    whole = draw_bits(images, generator=torch.Generator().manual_seed(6))
    generator = torch.Generator().manual_seed(6)
    parts = [draw_bits(part, generator=generator) for part in images.split(2)]
    assert np.array_equal(whole, np.concatenate(parts))


def test_no_images():
    assert draw_binary(
        torch.empty(0, 1, 2, 2, dtype=torch.uint8), generator=torch.Generator()
    ).shape == (0, 1, 2, 2)
