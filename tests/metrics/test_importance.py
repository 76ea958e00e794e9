import math

import pytest
import torch

from ncprior.metrics.importance import WeightSums
from ncprior.numerics import log_z


@pytest.mark.parametrize("pieces", [1, 3, 100])
def test_pieces_say_what_all_weights_say(pieces, rng):
    """However they come, and in whatever order of size: as `log_z` of each image's weights."""
    log_w = 3 * torch.randn(600, 4, generator=rng, dtype=torch.float64) - 800
    log_w[:, 1] = log_w[:, 1].sort().values
    log_w[:50, 2] = -math.inf
    sums = WeightSums(600)
    for piece in log_w.tensor_split(pieces):
        sums.add(piece)
    found = sums.summary()
    for i in range(4):
        expected = log_z(log_w[:, i])
        for value, name in zip(found, ("value", "se", "ess", "k_hat"), strict=True):
            assert float(value[i]) == pytest.approx(getattr(expected, name), rel=1e-9)


def test_nothing_but_zero_weights(rng):
    sums = WeightSums(2)
    for _ in range(2):
        sums.add(torch.full((1, 1), -math.inf))
    assert sums.summary().log_mean.tolist() == [-math.inf]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_unusable_weights(bad):
    with pytest.raises(ValueError, match="an importance weight is NaN or infinite"):
        WeightSums(3).add(torch.tensor([[0.0, bad]]))
