import math

import pytest
import torch

from ncprior.priors.codes import Codes
from ncprior.priors.snis import SNISPrior

AXIS = torch.linspace(-8, 8, 1601, dtype=torch.float64)
STEP = float(AXIS[1] - AXIS[0])


def prior_1d(proposals):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = SNISPrior(1, proposals=proposals, hidden=(8,)).double().eval()
    prior.network[0].weight.data.mul_(2)
    prior.network[2].weight.data.mul_(5)
    return prior.requires_grad_(False)


def law_of_two(prior):
    """log p_2 on the axis: p(z) e^f(z) E[2 / (e^f(z) + e^f(y))], y from p, by quadrature."""
    base = torch.distributions.Normal(0.0, 1.0).log_prob(AXIS)
    f = prior.score(AXIS[:, None])
    log_mean = torch.logaddexp(f[:, None], f) - math.log(2)
    return base + f + (base - log_mean).logsumexp(1) + math.log(STEP)


def test_two_proposals_have_the_law_found_by_quadrature(rng):
    """Shares of ten bins, each within 4.5 standard errors (1 seed in 15,000 fails by chance)."""
    prior, n = prior_1d(2), 60_000
    density = law_of_two(prior).exp() * STEP
    assert float(density.sum()) == pytest.approx(1, abs=1e-9)
    z = prior.sample((n // 2, 2), generator=rng)
    assert z.shape == (n // 2, 2, 1) and z.dtype == torch.float64
    edges = torch.linspace(-2, 2, 9, dtype=torch.float64)
    found = torch.bincount(torch.bucketize(z.flatten(), edges), minlength=10) / n
    expected = torch.zeros(10, dtype=torch.float64)
    expected.index_add_(0, torch.bucketize(AXIS, edges), density)
    tolerance = 4.5 * (expected * (1 - expected) / n).sqrt() + 0.5 * STEP
    assert ((found - expected).abs() < tolerance).all()
    # Neither the base nor the limit of many proposals would pass.
    limit = prior.unnormalized_log_prob(AXIS[:, None]).softmax(0)
    for other in (limit, torch.distributions.Normal(0.0, 1.0).log_prob(AXIS).exp() * STEP):
        shares = torch.zeros(10, dtype=torch.float64)
        shares.index_add_(0, torch.bucketize(AXIS, edges), other)
        assert ((shares - expected).abs() > 2 * tolerance).any()


def test_one_proposal_is_the_base():
    prior = prior_1d(1)
    z = prior.sample((50,), generator=torch.Generator().manual_seed(1))
    expected = prior.base_sample((50,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    bound = prior.log_prob_bound(z, generator=torch.Generator())
    torch.testing.assert_close(bound, torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]))


def test_bound_is_below_and_reaches_the_density(rng):
    """In the mean; with many sets of proposals its error is that of a mean, and its bias."""
    prior, at = prior_1d(2), torch.arange(200, 1401, 100)
    z, exact = AXIS[at, None], law_of_two(prior)[at]
    each = torch.stack([prior.log_prob_bound(z, generator=rng) for _ in range(2000)])
    se = each.std(0) / math.sqrt(len(each))
    assert (each.mean(0) < exact + 4 * se).all()
    assert (each.mean(0) < exact - 0.01).any()
    many = prior.log_prob_bound(z, generator=rng, draws=40_000)
    # The relative error of the mean of 1 / [...]: its spread is at most that of exp(each).
    spread = (each - exact).exp().std(0) / math.sqrt(40_000)
    assert ((many - exact).abs() < 4.5 * spread + 1e-3).all()


def test_fit_recovers_a_known_ratio():
    """q = N(0.7, I) on N(0, I): f(z) = 0.7 sum z up to a constant."""
    shift = 0.7
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    codes = Codes(shift + 0.8 * noise, torch.full_like(noise, 0.6))
    prior = SNISPrior.fit(
        codes, proposals=256, matched=False, hidden=(32,), steps=400, learning_rate=1e-2
    )
    z = shift + torch.randn(4000, 2, generator=torch.Generator().manual_seed(2))
    error = prior.score(z).detach() - shift * z.sum(1)
    # The codes' own mean is known to 0.016 a coordinate, which alone makes 0.02.
    assert float(error.std()) < 0.15
    draws = prior.sample((4000,), generator=torch.Generator().manual_seed(3))
    assert float((draws.mean(0) - shift).abs().max()) < 0.1
    assert not prior.training


def test_log_z_of_the_limit(rng):
    prior = prior_1d(8)
    exact = (prior.unnormalized_log_prob(AXIS[:, None]).logsumexp(0) + math.log(STEP)).item()
    found = prior.estimate_log_z(50_000, generator=rng)
    assert 0 < found.se < 0.02 and abs(found.value - exact) < 4 * found.se


def test_rows_under_a_vae():
    """In training fresh proposals with a gradient, in evaluation the same each time."""
    prior = prior_1d(16).requires_grad_(True)
    z = torch.zeros(3, 1, dtype=torch.float64)
    rows = prior.rows(3)
    assert torch.equal(rows.log_prob(z), rows.log_prob(z))
    prior.train()
    with torch.random.fork_rng():
        first, second = rows.log_prob(z), rows.log_prob(z)
    assert not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), prior.network[0].weight)
    assert gradient.abs().sum() > 0
    assert rows.sample(generator=torch.Generator()).shape == (3, 1)


def test_needs_a_proposal():
    with pytest.raises(ValueError, match="proposals must be at least 1"):
        SNISPrior(2, proposals=0)
