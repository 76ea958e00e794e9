import math

import pytest
import torch

from ncprior.metrics import sliced
from ncprior.metrics.sliced import sliced_wasserstein


def normal(n, rng, size=3, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, size, generator=rng, dtype=torch.float64)


def test_one_dimension_is_exact(rng):
    """Sorted points go to sorted points: moved by 3, spread to twice, or in another order."""
    x = normal(40, rng, 1)
    assert sliced_wasserstein(x, x + 3, generator=rng).value == pytest.approx(3)
    doubled = sliced_wasserstein(x, 2 * x, generator=rng).value
    assert doubled == pytest.approx(float(x.square().mean().sqrt()))
    mixed = x[torch.randperm(40, generator=rng)]
    assert sliced_wasserstein(x, mixed, generator=rng).value == 0


@pytest.mark.parametrize("at_once", [1 << 22, 100])
def test_closed_form_of_gaussians(rng, monkeypatch, at_once):
    """Between N(0, I) and N(m, s^2 I) the mean of W2^2 over directions is |m|^2 / d + (1 - s)^2.

    4 standard errors, and the bias: sorting two samples of n from N(0, 1) costs about
    2 log log n / n in W2^2 (Bobkov and Ledoux 2019); through the root half of it over the value.
    """
    monkeypatch.setattr(sliced, "NUMBERS_AT_ONCE", at_once)
    n, size, scale, shift = 2000, 3, 1.5, 0.4
    expected = math.sqrt(shift**2 + (1 - scale) ** 2)
    found = sliced_wasserstein(
        normal(n, rng, size), normal(n, rng, size, scale, shift), generator=rng
    )
    bias = (1 + scale**2) * math.log(math.log(n)) / n / (2 * expected)
    assert abs(found.value - expected) < 4 * found.se + bias
    assert found.se < 0.05 * expected


def test_error_is_right_over_many_runs(rng):
    """The spread of 200 values is known to 1 / sqrt(400) = 5 %, a jackknife of 20 blocks is too."""
    found = [
        sliced_wasserstein(
            normal(100, rng), normal(100, rng, scale=1.3, shift=0.3), directions=40, generator=rng
        )
        for _ in range(200)
    ]
    spread = float(torch.tensor([f.value for f in found]).std())
    claimed = float(torch.tensor([f.se for f in found]).square().mean().sqrt())
    assert claimed / spread == pytest.approx(1, abs=4 * 0.05 + 0.05)


def test_equal_laws_are_the_nearer_the_more_rows(rng):
    few, many = (
        sliced_wasserstein(normal(n, rng), normal(n, rng), generator=rng).value for n in (100, 6400)
    )
    assert 0 < many < few / 4  # 8 times less, but for the spread


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (torch.zeros(50, 2), torch.zeros(40, 2), {}, r"\(50, 2\) and \(40, 2\)"),
        (torch.zeros(39, 2), torch.zeros(39, 2), {}, "two rows for each"),
        (torch.zeros(50, 2), torch.zeros(50, 2), {"directions": 1}, "2 directions"),
        (torch.zeros(50, 2), torch.full((50, 2), math.inf), {}, "finite"),
    ],
)
def test_rejects_what_cannot_be_compared(rng, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        sliced_wasserstein(x, y, **options, generator=rng)
