"""Three estimates of log Z against the exact one, and their stated errors against their errors."""

import math

import pytest
import torch
from toys import ExactFlat, TwoGroups, standard_normal

from ncprior import NoiseContrastivePrior
from ncprior.metrics.annealing import Schedule, anneal, tuned_schedule
from ncprior.metrics.bridge import bridge_log_z
from ncprior.metrics.normalizer import estimate_log_z, flat_target
from ncprior.normal import LOG_2_PI
from ncprior.numerics import log_z
from ncprior.priors import GaussianMixture

RUNS = 400


def log_base(z):
    return -0.5 * (z.square() + LOG_2_PI).sum(1)


def log_ratio(z):
    """Two modes and a bent valley in the plane; no closed form, so that Z comes from a grid."""
    return 1.2 * torch.sin(2 * z[:, 0]) - 0.4 * (z[:, 1] - 1).square() + (z[:, 0] * z[:, 1]).tanh()


def grid_log_z(log_r, log_p, reach=9.0, count=721):
    """log of the integral of r p over a square: the trapezoidal rule, exact for smooth r p."""
    line = torch.linspace(-reach, reach, count, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return float((log_r(points) + log_p(points)).logsumexp(0)) + 2 * math.log(2 * reach / 720)


class Ratio(torch.nn.Module):
    def forward(self, z, context=None):
        return log_ratio(z)


class Tilt(torch.nn.Module):
    """log r = a sum(z): multiplies N(m, S) by exp(a 1'm + a^2 1'S1 / 2)."""

    a = 0.5

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


@pytest.fixture(scope="module")
def annealed():
    """Chains of 400 repeats, 400 each, side by side."""
    generator = torch.Generator().manual_seed(0)
    densities = (log_base, log_ratio)
    few, many = (
        torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (64, 400 * RUNS)
    )
    schedule = tuned_schedule(*densities, few, 10, leapfrog=1, generator=generator)
    return anneal(*densities, many, schedule, leapfrog=1, further=5, generator=generator)


def check(found, exact):
    """The exact value lies within 1.96 stated errors in at least 93 % of the repeats.

    Of 400 repeats at 95 %, 93 % or more are right with probability 0.97. The logarithm of a mean
    is too low by se^2 / 2, half a standard error times `se`.
    """
    se = torch.tensor([f.se for f in found], dtype=torch.float64)
    scores = (torch.tensor([f.value for f in found], dtype=torch.float64) - exact) / se
    assert float((scores.abs() < 1.96).double().mean()) >= 0.93
    assert abs(float(scores.mean() + se.mean() / 2)) < 4 / math.sqrt(RUNS)
    # A standard deviation of 400 has a relative error of 1 / sqrt(800).
    assert float(scores.std()) == pytest.approx(1, abs=4 / math.sqrt(2 * RUNS))


def test_base_draws_state_their_error(rng):
    z = torch.randn(RUNS, 1000, 2, generator=rng, dtype=torch.float64)
    check([log_z(log_ratio(one)) for one in z], grid_log_z(log_ratio, log_base))


@pytest.mark.slow
def test_annealing_states_its_error(annealed):
    found = [log_z(part) for part in annealed.log_weights.view(RUNS, -1)]
    check(found, grid_log_z(log_ratio, log_base))
    assert ((annealed.acceptance > 0.5) & (annealed.acceptance < 0.95)).all()


@pytest.mark.slow
def test_bridging_states_its_error(annealed, rng):
    z = torch.randn(RUNS, 500, 2, generator=rng, dtype=torch.float64)
    weights = annealed.log_weights.view(RUNS, -1)
    along = annealed.along.view(RUNS, -1, 5)
    found = [
        bridge_log_z(log_ratio(one), *rest) for one, *rest in zip(z, along, weights, strict=True)
    ]
    check(found, grid_log_z(log_ratio, log_base))


SMALL = {"draws": 20_000, "chains": 400, "temperatures": 20, "leapfrog": 2, "further": 5}


def check_once(found, exact):
    """4 standard errors, and those are not wide."""
    assert set(found) == {"base", "ais", "bridge"}
    for estimate in found.values():
        assert abs(estimate.value - exact) < 4 * estimate.se + estimate.se**2
        assert estimate.se < 0.06 and (estimate.k_hat or 0) < 0.7


def test_all_three_on_the_grid():
    prior = NoiseContrastivePrior([Ratio()], standard_normal(2))
    found = estimate_log_z(prior.under(ExactFlat(2)), prior, **SMALL)
    check_once(found, grid_log_z(log_ratio, log_base))
    assert len({estimate.value for estimate in found.values()}) == 3


def test_two_groups_are_one_density_of_their_noise(rng):
    """The second ratio sees the noise of its group, so log Z = 2 groups * 2 * a^2 / 2."""
    vae, prior = TwoGroups(2), NoiseContrastivePrior([Tilt(), Tilt()])
    found = estimate_log_z(vae, prior, **SMALL, rows_at_once=150)
    check_once(found, 2 * Tilt.a**2)

    target = flat_target(vae, prior)
    noise = target.sample(7, rng)
    torch.testing.assert_close(target.log_ratio(noise), Tilt.a * noise.sum(1))
    torch.testing.assert_close(target.log_base(noise), log_base(noise))


def test_a_base_that_is_no_normal():
    base = GaussianMixture(2, 2)
    base.set(
        torch.tensor([0.3, 0.7]).log(),
        torch.tensor([[-1.5, 0.0], [1.0, 0.5]]),
        torch.diag_embed(torch.tensor([[0.5, 0.8], [0.4, 0.6]])),
    )
    base = base.double()
    prior = NoiseContrastivePrior([Tilt()], base)
    found = estimate_log_z(prior.under(ExactFlat(2)), prior, **SMALL)
    variances = base.cholesky.square().sum((1, 2))
    parts = base.log_weights + Tilt.a * base.means.sum(1) + Tilt.a**2 * variances / 2
    check_once(found, float(parts.logsumexp(0)))


def test_heavy_tails_are_called_so():
    """A ratio that puts the mass where the base hardly is: k-hat says it; the others are right."""

    class Far(torch.nn.Module):
        def forward(self, z, context=None):  # r p = N(2, 0.4^2), normalised
            return (-0.5 * ((z - 2) / 0.4).square() - math.log(0.4) + 0.5 * z.square()).sum(-1)

    prior = NoiseContrastivePrior([Far()], standard_normal(3))
    options = {"draws": 20_000, "chains": 400, "temperatures": 60}
    found = estimate_log_z(prior.under(ExactFlat(3)), prior, **options)
    assert found["base"].k_hat > 0.7
    for estimate in (found["ais"], found["bridge"]):
        assert estimate.k_hat < 0.7 and estimate.se < 0.2
        assert abs(estimate.value) < 4 * estimate.se


def test_same_seed_same_estimates():
    prior = NoiseContrastivePrior([Ratio()], standard_normal(2))
    options = {"draws": 50, "chains": 5, "temperatures": 3}
    a, b, c = (estimate_log_z(ExactFlat(2), prior, **options, seed=s) for s in (0, 0, 1))
    assert a == b and a["bridge"] != c["bridge"]


def test_progress_reaches_its_total():
    seen, prior = [], NoiseContrastivePrior([Ratio()], standard_normal(2))
    options = {"draws": 50, "chains": 5, "temperatures": 3, "rows_at_once": 2}
    estimate_log_z(ExactFlat(2), prior, **options, on_step=lambda *step: seen.append(step))
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done) and done[-1] == totals[-1] and len(set(totals)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["base", "guess"]}, "methods must be of base, ais, bridge"),
        ({"chains": 1}, "draws and chains must be at least 2"),
        ({"temperatures": 0}, "temperatures, leapfrog and further at least 1"),
    ],
)
def test_arguments(options, message):
    prior = NoiseContrastivePrior([Ratio()], standard_normal(2))
    with pytest.raises(ValueError, match=message):
        estimate_log_z(ExactFlat(2), prior, **options)


def test_a_ratio_that_is_not_finite(rng):
    start = torch.randn(5, 2, generator=rng, dtype=torch.float64)
    schedule = Schedule(torch.tensor([0.5, 1.0]), torch.full((2,), 0.5))
    with pytest.raises(ValueError, match="not finite at a draw of the base"):
        anneal(log_base, lambda z: log_ratio(z) * math.nan, start, schedule, generator=rng)
