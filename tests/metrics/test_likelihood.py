"""What `tests/test_walk.py` leaves: exact evidence is checked there for exact posteriors."""

import math

import pytest
import torch
from toys import ExactFlat, TwoGroups, standard_normal

from ncprior import NoiseContrastivePrior
from ncprior.metrics import importance_weighted_bounds


class Tilt(torch.nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


@pytest.fixture
def images(rng):
    return torch.rand(3, 1, 1, 2, generator=rng, dtype=torch.float64)


def test_tilted_prior_against_its_closed_form(images, rng):
    """log r = a z puts the prior at N(a, I): p(x) = N(x; 0.5 + c a, c^2 + sigma^2) and Z is known.

    The bound from S samples of the posterior is off by O(1/S), about Var(w) / (2 S).
    """
    a, samples, vae = 0.4, 40_000, ExactFlat(2)
    prior = NoiseContrastivePrior([Tilt(a)], standard_normal(2))
    found = importance_weighted_bounds(vae, images, samples, prior=prior, generator=rng)
    c, log_z = vae.decoder.c.item(), 2 * a**2 / 2
    marginal = torch.distributions.Normal(0.5 + c * a, vae.spread)
    expected = marginal.log_prob(images).flatten(1).sum(1)
    # Weights are exp(a z): log-normal of variance 2 a^2 v under the posterior's variance v.
    spread = 2 * a**2 / (1 + (c / 0.1) ** 2)
    error = 4 * math.sqrt(math.expm1(spread) / samples)
    assert ((found.unnormalized_ncp - log_z - expected).abs() < error).all()
    torch.testing.assert_close(found.base, vae.log_evidence(images))


def test_a_constant_ratio_moves_the_bound_by_itself(images, rng):
    class Constant(torch.nn.Module):
        def forward(self, z, context=None):
            return torch.full((len(z),), 1.5, dtype=z.dtype)

    vae = TwoGroups(2, widen=1.4)
    prior = NoiseContrastivePrior([Constant(), Constant()])
    found = importance_weighted_bounds(vae, images, 5, prior=prior, generator=rng)
    torch.testing.assert_close(found.unnormalized_ncp, found.base + 3.0)


def test_bound_rises_to_the_evidence(images, rng):
    """With a posterior twice too wide: below log p(x), and nearer to it with more samples."""
    vae, copies = TwoGroups(2, widen=2.0), 4000
    many = images[:1].expand(copies, -1, -1, -1)
    exact = float(vae.log_evidence(images[:1]))
    gaps = []
    for samples in (1, 8, 64):
        bound = importance_weighted_bounds(vae, many, samples, generator=rng).base
        gaps.append((exact - float(bound.mean()), 4 * float(bound.std()) / math.sqrt(copies)))
    kl = 2 * (0.5 * (4 - 1) - math.log(2))  # one sample: the ELBO
    assert abs(gaps[0][0] - kl) < gaps[0][1]
    assert gaps[0][0] - gaps[0][1] > gaps[1][0] + gaps[1][1]
    assert gaps[1][0] - gaps[1][1] > gaps[2][0] + gaps[2][1]
    assert gaps[2][0] > -gaps[2][1]


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_must_be_positive(samples, images, rng):
    with pytest.raises(ValueError, match="samples must be at least 1"):
        importance_weighted_bounds(ExactFlat(2), images, samples, generator=rng)
