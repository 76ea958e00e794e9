import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from ncprior.priors import Codes, TwoStagePrior


@pytest.fixture
def linear():
    """z = W u + b + gamma noise with a diagonal W, and the exact posterior of u.

    The layers' outputs are cut off; what is left is the input beside them.
    """
    prior = TwoStagePrior(3, hidden=(4,)).double().requires_grad_(False)
    gains, shift = torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.3, -1.0, 0.0])
    gamma, spread = 0.4, torch.tensor([2.0, 0.1, 1.0])
    variance = gamma**2 / (gains.square() + gamma**2)
    for network in (prior.encoder, prior.decoder):
        network.out.weight.zero_()
        network.out.bias.zero_()
    prior.decoder.out.weight[:, 4:] = torch.diag(gains)
    prior.decoder.out.bias.copy_(shift)
    pull = variance * gains / gamma**2
    prior.encoder.out.weight[:3, 4:] = torch.diag(pull)
    prior.encoder.out.bias[:3] = -pull * shift
    prior.encoder.out.bias[3:] = 0.5 * variance.log()
    prior.log_noise.fill_(math.log(gamma))
    prior.spread.copy_(spread)
    prior.loc.fill_(5.0)
    covariance = torch.diag((gains.square() + gamma**2) * spread.square()).double()
    return prior.eval(), MultivariateNormal((shift * spread + 5).double(), covariance)


@pytest.mark.parametrize("num", [1, 8])
def test_bound_with_the_exact_posterior_is_log_p(linear, num, rng):
    """All weights are then the same, p(z), whatever is drawn (to single precision of weights)."""
    prior, truth = linear
    z = prior.sample((4, 2), generator=rng)
    found = prior.log_prob_bound(z, num=num, generator=rng)
    torch.testing.assert_close(found, truth.log_prob(z), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        prior.elbo(z.view(8, 3), generator=rng), truth.log_prob(z).view(8), rtol=1e-5, atol=1e-5
    )


def test_bound_with_another_posterior_is_below_and_rises(linear, rng):
    """And the mean of exp(bound) of one draw is p(z): the weights stay unbiased."""
    prior, truth = linear
    prior.encoder.out.bias[3:] += 0.3
    n = 2000
    z = prior.sample((n,), generator=rng)
    exact = truth.log_prob(z)
    gaps = [exact - prior.log_prob_bound(z, num=num, generator=rng) for num in (1, 10, 2000)]
    errors = [float(gap.std()) / math.sqrt(n) for gap in gaps]
    assert gaps[0].mean() > 4 * errors[0] and gaps[0].mean() > gaps[1].mean() + 4 * errors[0]
    # With 2000 draws the bound is off by var(w) / 4000 only.
    assert abs(float(gaps[2].mean())) < 4 * errors[2] + 1e-3


def test_sample_moments(linear, rng):
    """4 standard errors."""
    prior, truth = linear
    n = 40_000
    z = prior.sample((n,), generator=rng)
    assert ((z.mean(0) - truth.mean).abs() < 4 * (truth.variance / n).sqrt()).all()
    assert ((z.var(0) / truth.variance - 1).abs() < 4 * math.sqrt(2 / n)).all()


def test_bound_does_not_depend_on_pieces(linear):
    """In pieces of 65,536 / num: every latent is there, in its place."""
    prior, truth = linear
    z = prior.sample((300,), generator=torch.Generator().manual_seed(0))
    found = prior.log_prob_bound(z, num=1000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found, truth.log_prob(z), rtol=1e-5, atol=1e-5)


def test_finds_a_curve(rng):
    """Codes on a noisy parabola: the second stage's samples lie on it too."""
    u = torch.randn(4000, generator=rng)
    loc = torch.stack([u, u.square()], 1)
    prior = TwoStagePrior.fit(
        Codes(loc, torch.full_like(loc, 0.1)), hidden=(32, 32), steps=1000, learning_rate=3e-3
    )
    z = prior.sample((4000,), generator=rng)
    normal = loc.mean(0) + loc.std(0) * torch.randn(4000, 2, generator=rng)
    off, plain = ((a[:, 1] - a[:, 0].square()).abs().median() for a in (z, normal))
    assert off < 0.4 * plain


def test_rows_have_the_bound(linear):
    prior, truth = linear
    rows = prior.rows(4)
    z = rows.sample(generator=torch.Generator().manual_seed(0))
    assert z.shape == (4, 3)
    torch.testing.assert_close(rows.log_prob(z), truth.log_prob(z), rtol=1e-5, atol=1e-5)
    assert torch.equal(rows.tempered(1.0).log_prob(z), rows.log_prob(z))


def test_no_other_temperature(linear):
    with pytest.raises(ValueError, match=r"no temperature but 1, got 0\.7"):
        linear[0].tempered(0.7)
    with pytest.raises(ValueError, match="hidden must hold widths"):
        TwoStagePrior(2, hidden=())
