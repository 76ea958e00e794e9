import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ncprior.numerics import (
    bootstrap_interval,
    effective_sample_size,
    jackknife,
    log_mean_exp,
    log_z,
    mean_and_se,
    stream,
    stream_seed,
)

PURPOSES = (
    *("vae", "ncp", "images", "order", "evidence", "heldout", "seen", "base", "draw", "nll"),
    *("bootstrap", "ratio weights", "log z", "nll log z", "nll images", "validation images"),
    *("heldout rows", "heldout draws", "base images", "reconstructed rows"),
)


def doubles(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_log_mean_exp():
    x = doubles(-1000.0, -1000.0 + math.log(3))
    assert float(log_mean_exp(x)) == pytest.approx(-1000 + math.log(2))
    assert float(log_mean_exp(doubles(-math.inf, 0.0))) == pytest.approx(-math.log(2))
    expected = doubles(0, 1) - 1000 + math.log(2)
    torch.testing.assert_close(log_mean_exp(torch.stack([x, x + 1]), 1), expected)


@given(st.integers(1, 50), st.floats(-500, 500))
def test_effective_sample_size(n, shift):
    """n for equal weights, 1 for a single one, whatever their scale."""
    equal = torch.full((n,), shift, dtype=torch.float64)
    assert float(effective_sample_size(equal)) == pytest.approx(n)
    single = torch.full((n,), -math.inf, dtype=torch.float64)
    single[0] = shift
    assert float(effective_sample_size(single)) == pytest.approx(1)


def test_effective_sample_size_by_hand():
    weights = doubles(1.0, 2.0, 3.0)
    assert float(effective_sample_size(weights.log())) == pytest.approx(36 / 14)


def test_log_z_of_a_constant():
    found = log_z(torch.full((100,), 2.5, dtype=torch.float64))
    assert found[:4] == pytest.approx((2.5, 0.0, 100.0, 100), abs=1e-6)
    assert found.k_hat is None  # no tail


def test_log_z_standard_error_over_many_runs(rng):
    """log r = a z under N(0, 1): log Z = a^2 / 2, and the error is as large as it says."""
    a, m, runs = 0.7, 2000, 1500
    found = [log_z(a * torch.randn(m, generator=rng, dtype=torch.float64)) for _ in range(runs)]
    values = doubles(*(f.value for f in found))
    said = doubles(*(f.se for f in found)).square().mean().sqrt()
    bias = math.expm1(a**2) / (2 * m)
    assert abs(values.mean() + bias - a**2 / 2) < 4 * values.std() / math.sqrt(runs)
    # A standard deviation from 1500 runs has a relative error of 1 / sqrt(3000) = 0.018; the
    # second-order bias of either is O(1 / m).
    assert float(values.std() / said) == pytest.approx(1, abs=4 * 0.018 + 0.01)
    assert found[0].num == m


def test_mean_and_se():
    found = mean_and_se(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert found == pytest.approx((2.5, math.sqrt(5 / 3 / 4)))
    assert math.isnan(mean_and_se(torch.tensor([1.0])).se)


def test_jackknife_of_a_mean_is_its_standard_error(rng):
    """Exactly, for blocks of one; and for two sources the variances add."""
    a, b = (torch.randn(n, generator=rng, dtype=torch.float64) for n in (30, 20))

    def difference(x, y):
        return float(torch.stack(x).mean() - torch.stack(y).mean())

    found = jackknife(difference, list(a), list(b))
    assert found.value == pytest.approx(float(a.mean() - b.mean()))
    assert found.se == pytest.approx(math.sqrt(a.var() / 30 + b.var() / 20))


def test_bootstrap_interval_covers(rng):
    """Of 95 % intervals for the sum of two means, about 95 % hold it.

    Percentile intervals of n = 60 skewed values undercover by some 2 %; with 150 runs the share's
    standard error is 1.8 %.
    """
    runs, held = 150, 0
    for _ in range(runs):
        u = torch.rand(60, generator=rng, dtype=torch.float64)
        v = torch.randn(90, generator=rng, dtype=torch.float64)
        low, high = bootstrap_interval(-u.log(), v, generator=rng, resamples=150)
        held += low < 1.0 < high
    assert 0.95 - 0.02 - 4 * 0.018 < held / runs <= 1


def test_bootstrap_interval_width(rng):
    values = torch.randn(400, generator=rng, dtype=torch.float64)
    low, high = bootstrap_interval(values, generator=rng)
    # Quantiles of 2000 resamples: 5 % of the width at most.
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)


def test_streams_are_apart():
    """No purpose reaches the 50,000 indices of another, and no seed those of another seed."""
    for seed in range(20):
        starts = sorted(stream_seed(seed, purpose) for purpose in PURPOSES)
        assert min(b - a for a, b in itertools.pairwise(starts)) > 50_000
    starts = sorted(stream_seed(seed, "draw") for seed in range(1000))
    assert min(b - a for a, b in itertools.pairwise(starts)) > 50_000


def test_indices_give_distinct_streams():
    seeds = {stream_seed(3, "draw", i) for i in range(100_000)}
    assert len(seeds) == 100_000 and max(seeds) < 2**32
    first = [float(torch.rand((), generator=stream(3, "draw", i))) for i in range(500)]
    assert len(set(first)) == 500
    assert not torch.equal(
        torch.rand(4, generator=stream(0, "draw")), torch.rand(4, generator=stream(1, "draw"))
    )


def test_neighbouring_streams_are_uncorrelated():
    """Draw i of 4000 neighbouring streams: uniform, and no correlation of neighbours."""
    n = 4000
    x = torch.stack([torch.rand(2, generator=stream(0, "draw", i)) for i in range(n)]).double()
    u = (x - 0.5) * math.sqrt(12)
    assert (u.mean(0).abs() < 4 / math.sqrt(n)).all()
    assert abs((u[1:, 0] * u[:-1, 0]).mean()) < 4 / math.sqrt(n)
    assert abs((u[:, 0] * u[:, 1]).mean()) < 4 / math.sqrt(n)
