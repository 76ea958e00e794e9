import math

import pytest
import torch

from ncprior.normal import Normal
from ncprior.priors.codes import Codes
from ncprior.priors.lars import LARSPrior

AXIS = torch.linspace(-10, 10, 4001, dtype=torch.float64)
STEP = float(AXIS[1] - AXIS[0])


def prior_1d(truncation, bias=-1.5):
    """A prior in one dimension whose acceptance varies, with its Z by the trapezoidal rule."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        prior = LARSPrior(1, truncation=truncation, hidden=(8,)).double().eval()
    prior.network[0].weight.data.mul_(3)
    prior.network[2].weight.data.mul_(10)
    prior.network[2].bias.data.fill_(bias)
    prior.requires_grad_(False)
    base = torch.distributions.Normal(0.0, 1.0).log_prob(AXIS).exp()
    a = prior.score(AXIS[:, None]).sigmoid()
    prior.acceptance.fill_(float((base * a).sum() * STEP))
    return prior, base, a


def law(base, a, acceptance, truncation):
    """p_T as the sum over the proposal that is accepted, and the last one."""
    kept = sum((1 - acceptance) ** t for t in range(truncation - 1))
    return base * a * kept + base * (1 - acceptance) ** (truncation - 1)


@pytest.mark.parametrize("truncation", [1, 2, 3, 100])
def test_density_is_the_sum_over_proposals(truncation):
    prior, base, a = prior_1d(truncation)
    expected = law(base, a, prior.acceptance, truncation)
    found = prior.log_prob(AXIS[:, None]).exp()
    torch.testing.assert_close(found, expected)
    assert 0.05 < prior.acceptance < 0.5  # so that truncation matters
    assert float(found.sum() * STEP) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("truncation", [2, 4, 100])
def test_samples_follow_the_density(truncation, rng):
    """Shares of ten bins, each within 4.5 standard errors (1 seed in 15,000 fails by chance)."""
    prior, _, _ = prior_1d(truncation)
    n = 60_000
    z = prior.sample((n // 2, 2), generator=rng)
    assert z.shape == (n // 2, 2, 1) and z.dtype == torch.float64
    edges = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = torch.bincount(torch.bucketize(z.flatten(), edges), minlength=10) / n
    density = prior.log_prob(AXIS[:, None]).exp() * STEP
    expected = torch.zeros(10, dtype=torch.float64)
    expected.index_add_(0, torch.bucketize(AXIS, edges), density)
    # A bin's edge may be off by half a step of the axis.
    tolerance = 4.5 * (expected * (1 - expected) / n).sqrt() + 0.5 * STEP
    assert ((found - expected).abs() < tolerance).all()
    if truncation > 2:  # the base is another law
        base = torch.distributions.Normal(0.0, 1.0).cdf(edges).diff()
        assert ((found[1:-1] - base).abs() > 2 * tolerance[1:-1]).any()


def test_estimate_of_z(rng):
    prior, _, _ = prior_1d(100)
    exact = float(prior.acceptance)
    prior.estimate_acceptance(100_000, generator=rng)
    assert 0 < prior.acceptance_se < 2e-3
    assert abs(prior.acceptance - exact) < 4 * prior.acceptance_se


@pytest.mark.parametrize("with_posterior", [False, True])
def test_training_estimate_is_unbiased(with_posterior, rng):
    """Also with a weighed draw of the posterior, which here counts as one draw in four."""
    prior, _, _ = prior_1d(100)
    exact, found = float(prior.acceptance), []
    prior.estimate_draws = 3
    posterior = Normal(torch.tensor([[0.3]]).double(), torch.tensor([[1.2]]).double())
    for _ in range(2000):
        z = posterior.sample(generator=rng)
        given = posterior if with_posterior else None
        prior.training_log_prob(z, generator=rng, posterior=given, decay=0.0)
        found.append(float(prior.acceptance))
    found = torch.tensor(found)
    assert abs(float(found.mean()) - exact) < 4 * float(found.std()) / math.sqrt(len(found))


def test_training_gradient_is_that_of_the_newest_estimate(rng):
    prior, _, _ = prior_1d(5)
    prior.requires_grad_(True)
    z = torch.randn(7, 1, generator=rng, dtype=torch.float64)
    state = rng.get_state()
    base = prior.base_sample((prior.estimate_draws,), generator=rng)
    acceptance = prior.score(base).sigmoid().mean()
    expected = law(prior.base_log_prob(z).exp(), prior.score(z).sigmoid(), acceptance, 5).log()
    rng.set_state(state)
    found = prior.training_log_prob(z, generator=rng, decay=0.0)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), list(prior.parameters())),
        torch.autograd.grad(expected.sum(), list(prior.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_moving_average(rng):
    prior, _, _ = prior_1d(100)
    prior.acceptance.fill_(0.5)
    z = torch.zeros(2, 1, dtype=torch.float64)
    prior.training_log_prob(z, generator=rng, decay=0.75)
    moved = float(prior.acceptance)
    prior.acceptance.fill_(0.5)
    prior.training_log_prob(z, generator=torch.Generator().manual_seed(0), decay=0.0)
    assert moved == pytest.approx(0.75 * 0.5 + 0.25 * float(prior.acceptance))


def test_fit_recovers_a_ratio_that_rejection_can_express():
    """q = N(0, s^2 I) in N(0, I): a(z) = q / (M p), M = s^-2, so that p_T comes close to q."""
    spread = 0.6
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    codes = Codes(0.8 * spread * noise, torch.full_like(noise, 0.6 * spread))
    prior = LARSPrior.fit(
        codes, matched=False, hidden=(32,), steps=500, learning_rate=1e-2, acceptance_draws=50_000
    )
    z = spread * torch.randn(4000, 2, generator=torch.Generator().manual_seed(2))
    true = torch.distributions.Normal(0.0, spread).log_prob(z).sum(1)
    from_base = float((true - torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)).mean())
    divergence = float((true - prior.log_prob(z)).detach().mean())  # KL(q || p_T), by draws of q
    assert from_base == pytest.approx(0.38, abs=0.03)
    assert -0.02 < divergence < 0.04
    assert not prior.training and prior.acceptance_se < 0.01 * prior.acceptance


def test_tempered_base_with_its_own_z(rng):
    prior, _, _ = prior_1d(100)
    cool = prior.tempered(0.5)
    values = cool.log_prob(AXIS[:, None]).exp()
    # Z comes from 131,072 draws, in which the density is off by as much, relatively.
    tolerance = 5 * float(cool.acceptance_se / cool.acceptance)
    assert float(values.sum() * STEP) == pytest.approx(1, abs=tolerance)
    assert prior.acceptance != cool.acceptance and prior.temperature == 1
    torch.testing.assert_close(cool.score(AXIS[:, None]), prior.score(AXIS[:, None]))
    assert prior.tempered(1.0) is prior


@pytest.mark.parametrize("setting", [{"truncation": 0}, {"estimate_draws": 0}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=0"):
        LARSPrior(2, **setting)
