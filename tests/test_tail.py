import math

import pytest
import torch

from ncprior.tail import pareto_k, tail_shape, tail_size


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.8, 1.2])
def test_shape_of_pareto_weights(shape, rng):
    """Weights u^-k have a Pareto tail of shape k at every threshold; the estimate finds it."""
    num, runs = 10_000, 100
    uniform = torch.rand(num, runs, generator=rng, dtype=torch.float64)
    count = tail_size(num)
    found = tail_shape((-shape * uniform.log()).topk(count + 1, 0).values)
    # Maximum likelihood has the standard deviation (1 + k) / sqrt(M); ten weights of 0.5 pull.
    pull = 10 * (0.5 - shape) / (count + 10)
    error = (1 + shape) / math.sqrt(count)
    assert abs(found.mean() - shape - pull) < 4 * error / math.sqrt(runs) + 1 / count
    assert float(found.std()) == pytest.approx(error, rel=0.3)  # 4 / sqrt(2 * 100)


def test_light_tails_are_told_from_heavy_ones(rng):
    """Log-normal weights of spread 0.5 are harmless, of spread 5 useless; bounded ones negative."""
    noise = torch.randn(100_000, generator=rng, dtype=torch.float64)
    assert pareto_k(0.5 * noise) < 0.3
    assert pareto_k(5 * noise) > 0.9
    assert pareto_k(torch.rand(100_000, generator=rng, dtype=torch.float64).log()) < -0.7


def test_scale_and_order_do_not_matter(rng):
    log_w = torch.randn(3000, generator=rng, dtype=torch.float64)
    assert pareto_k(log_w.flip(0) + 300) == pytest.approx(pareto_k(log_w), abs=1e-9)


@pytest.mark.parametrize(
    "log_weights",
    [torch.zeros(1000), torch.randn(20), torch.tensor([0.0] + [-math.inf] * 999)],
    ids=["all equal", "too few", "one weight"],
)
def test_no_tail(log_weights):
    assert pareto_k(log_weights) is None


def test_tail_size():
    assert [tail_size(n) for n in (10, 225, 10_000)] == [2, 45, 300]
