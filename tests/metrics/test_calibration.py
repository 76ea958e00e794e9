import math

import pytest
import torch

from ncprior.metrics.calibration import reliability

SHIFT = 1.5


def draws(rng, n, m):
    """Of q = N(SHIFT, 1) and p = N(0, 1)."""
    p = torch.randn(m, generator=rng, dtype=torch.float64)
    return SHIFT + torch.randn(n, generator=rng, dtype=torch.float64), p


def log_ratio(z):
    return SHIFT * z - SHIFT**2 / 2


def inside(found):
    return ((found.predicted > found.low) & (found.predicted < found.high)).double()


@pytest.mark.parametrize(("n", "m"), [(5000, 5000), (1000, 8000)])
def test_the_true_ratio_is_calibrated(n, m, rng):
    """Predictions lie in 95 % of the intervals: of 100 repeats of 10 bins, 4 standard errors.

    Bins whose edges are seen quantiles are a little nearer to their predictions than chance.
    """
    share = []
    for _ in range(100):
        q, p = draws(rng, n, m)
        found = reliability(log_ratio(q), log_ratio(p), 10)
        assert int(found.count_q.sum()) == n and int(found.count_p.sum()) == m
        share.append(inside(found).mean())
    error = math.sqrt(0.95 * 0.05 / 1000)
    assert 0.95 - 4 * error < float(torch.stack(share).mean()) < 0.98


def test_observed_odds_of_a_bin(rng):
    """Two bins, cut where the densities cross: the odds are those of the normal tails."""
    q, p = draws(rng, 40_000, 40_000)
    found = reliability(log_ratio(q), log_ratio(p), 2)
    tail = 0.5 * math.erfc(SHIFT / 2 / math.sqrt(2))
    expected = math.log((1 - tail) / tail)
    error = 4 * math.sqrt((1 / tail + 1 / (1 - tail)) / 40_000)
    assert float(found.observed[1]) == pytest.approx(expected, abs=error)
    assert float(found.predicted[1]) == pytest.approx(expected, abs=error)
    assert float(found.high[1] - found.low[1]) == pytest.approx(
        2 * 1.96 * math.sqrt((1 / tail + 1 / (1 - tail) - 2) / 40_000), rel=0.03
    )


@pytest.mark.parametrize(
    ("wrong", "sign"), [(lambda r: 2 * r, 1), (lambda r: 0.5 * r, -1)], ids=["bold", "timid"]
)
def test_over_and_under_confidence_show(wrong, sign, rng):
    """Twice the true log r predicts more extreme odds than are seen, half of it milder ones."""
    q, p = draws(rng, 20_000, 20_000)
    found = reliability(wrong(log_ratio(q)), wrong(log_ratio(p)), 10)
    ends = torch.tensor([0, -1])
    excess = (found.predicted.abs() - found.observed.abs())[ends]
    assert (sign * excess > 0.3).all() and inside(found).mean() < 0.5
    right = reliability(log_ratio(q), log_ratio(p), 10)
    assert right.error < 0.1 < 0.3 < found.error


def test_a_constant_ratio_is_one_bin():
    found = reliability(torch.zeros(50), torch.zeros(80), 10)
    assert found.count_q.tolist() == [50] and found.count_p.tolist() == [80]
    assert found.predicted.tolist() == [0]
    assert abs(float(found.observed)) < 0.01


def test_a_bin_without_draws_of_p(rng):
    """Separable draws: infinite odds are not observed, and the interval is wide."""
    found = reliability(torch.full((100,), 30.0), torch.full((100,), -30.0), 2)
    assert found.count_p.tolist() == [100, 0]
    assert found.predicted.tolist() == pytest.approx([-30, 30])
    assert found.observed.isfinite().all() and float(found.high[1] - found.low[1]) > 5


@pytest.mark.parametrize(
    ("q", "bins", "message"),
    [
        (torch.zeros(5), 0, "bins must be at least 1"),
        (torch.zeros(5), 6, "6 bins for 5 draws of q and 50 of p"),
        (torch.full((50,), math.nan), 3, "NaN"),
    ],
)
def test_arguments(q, bins, message):
    with pytest.raises(ValueError, match=message):
        reliability(q, torch.zeros(50), bins)
