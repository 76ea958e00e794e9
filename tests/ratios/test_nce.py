import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import norm
from toys import true_log_ratio

from ncprior.ratios import calibrate, jsd, nce_loss


@pytest.fixture
def logits(rng):
    """Exact log-ratios of q = N(0.8, 0.6^2) to p = N(0, 1), at draws of q and of p."""
    noise = torch.randn(2, 20_000, 1, generator=rng, dtype=torch.float64)
    return true_log_ratio(0.8 + 0.6 * noise[0]), true_log_ratio(noise[1])


def test_loss_where_q_is_p():
    zero = torch.zeros(10, dtype=torch.float64)
    assert float(nce_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(jsd(nce_loss(zero, zero))) == pytest.approx(0)


def test_loss_where_they_do_not_overlap():
    far = torch.full((10,), 800.0, dtype=torch.float64)
    assert float(nce_loss(far, -far)) == 0
    assert float(nce_loss(-far, far)) == pytest.approx(1600)  # no overflow
    assert jsd(0.0) == pytest.approx(math.log(2))


def test_loss_is_the_sum_of_two_means_over_the_last_axis():
    a, b = torch.tensor([[0.3, -1.0], [2.0, 0.1]]).double(), torch.tensor([[0.5], [-0.7]]).double()
    log_d, log_not_d = a.sigmoid().log(), (1 - b.sigmoid()).log()
    torch.testing.assert_close(nce_loss(a, b), -log_d.mean(1) - log_not_d.mean(1))


def test_jsd_against_quadrature(logits):
    """Of the exact ratio it is the Jensen-Shannon divergence, within 4 standard errors."""
    q, p = norm(0.8, 0.6).pdf, norm(0, 1).pdf

    def integrand(x):
        m = 0.5 * (q(x) + p(x))
        return 0.5 * q(x) * np.log(q(x) / m) + 0.5 * p(x) * np.log(p(x) / m)

    expected, _ = quad(integrand, -8, 6, limit=200)
    at_q, at_p = logits
    losses = (torch.nn.functional.softplus(x) for x in (-at_q, at_p))
    error = 0.5 * math.sqrt(sum(float(x.var()) / len(x) for x in losses))
    assert abs(float(jsd(nce_loss(at_q, at_p))) - expected) < 4 * error


def test_exact_logits_need_no_calibration(logits):
    """(1, 0) within 4 standard errors: the sandwich H^-1 G H^-1 of the estimating equations."""
    hessian, noise = torch.zeros(2, 2).double(), torch.zeros(2, 2).double()
    for sign, x in zip((-1, 1), logits, strict=True):
        features, miss = torch.stack([x, torch.ones_like(x)], 1), (sign * x).sigmoid()
        hessian += (features * (miss * (1 - miss))[:, None]).T @ features / len(x)
        noise += torch.cov((features * miss[:, None]).T) / len(x)
    inverse = hessian.inverse()
    errors = 4 * (inverse @ noise @ inverse).diagonal().sqrt()
    temperature, shift = calibrate(*logits)
    assert abs(temperature - 1) < errors[0] and abs(shift) < errors[1]


@pytest.mark.parametrize(("temperature", "shift"), [(0.3, 0.5), (3.0, -2.0), (8.0, 1.0)])
def test_calibrate_undoes_a_known_distortion(temperature, shift, logits):
    plain, found = calibrate(*logits), calibrate(*((x - shift) / temperature for x in logits))
    expected = (plain[0] * temperature, plain[1] + plain[0] * shift)
    assert found == pytest.approx(expected, abs=1e-6)


def test_calibrate_finds_the_minimum(logits):
    """The same as a general optimiser, also with few draws."""
    a, b = logits[0][:40] * 2 + 1, logits[1][:60] * 2 + 1

    def loss(found):
        return float(nce_loss(found[0] * a + found[1], found[0] * b + found[1]))

    expected = minimize(loss, [1.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 0})
    assert calibrate(a, b) == pytest.approx(tuple(expected.x), abs=1e-4)


def test_calibrated_loss_is_never_worse(logits):
    for n in (30, 300):
        for scale in (0.1, 1.0, 5.0):
            a, b = (scale * x[:n] for x in logits)
            t, s = calibrate(a, b)
            assert nce_loss(t * a + s, t * b + s) <= nce_loss(a, b) + 1e-9


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_calibrate_keeps_its_bounds(sign):
    """Separable and inverted logits have no finite, positive optimum."""
    a, b = sign * torch.ones(50), sign * -torch.ones(50)
    temperature, shift = calibrate(a, b)
    assert temperature == (20.0 if sign > 0 else 0.05)
    assert shift == pytest.approx(0, abs=1e-6)
    assert calibrate(a, b, most=1.0)[0] == (1.0 if sign > 0 else 0.05)


def test_calibrate_finds_the_best_shift_at_a_bound(rng):
    """Logits the wrong way round: the temperature is at its bound, the shift the best for it."""
    a, b = torch.randn(2, 200, generator=rng, dtype=torch.float64) + 1
    a = a - 0.5
    temperature, shift = calibrate(a, b)
    assert temperature == 0.05
    best = minimize_scalar(lambda s: float(nce_loss(temperature * a + s, temperature * b + s)))
    assert shift == pytest.approx(best.x, abs=1e-4)


@pytest.mark.parametrize("noise_ratio", [0.3, 1.0, 10.0])
def test_the_log_ratio_is_the_optimum_whatever_the_noise_ratio(noise_ratio):
    """Quantiles stand for the two expectations; each direction away from log r costs."""
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    normal = torch.special.ndtri(uniform)
    at = [0.8 + 0.6 * normal, normal]
    exact = [true_log_ratio(z[:, None]) for z in at]

    def loss(step, direction):
        moved = [f + step * direction(z) for f, z in zip(exact, at, strict=True)]
        return float(nce_loss(*moved, noise_ratio))

    for direction in (torch.ones_like, torch.sin, torch.square):
        slope = (loss(1e-4, direction) - loss(-1e-4, direction)) / 2e-4
        assert abs(slope) < 2e-3 * noise_ratio  # tails beyond the last quantile
        assert loss(0.1, direction) > loss(0, direction) < loss(-0.1, direction)
