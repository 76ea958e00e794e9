import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture as Fit
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from ncprior import GaussianMixture
from ncprior.priors import Codes
from ncprior.priors.expectation import clusters, expectation_maximisation


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.fixture
def mixture():
    """Three components in the plane, with correlations."""
    found = GaussianMixture(3, 2).double()
    found.set(
        doubles([0.2, 0.5, 0.3]).log(),
        doubles([[-2.0, 0.0], [1.0, 1.0], [0.5, -2.0]]),
        doubles([[[0.5, 0.0], [0.3, 0.4]], [[1.0, 0.0], [-0.5, 0.7]], [[0.3, 0.0], [0.0, 0.3]]]),
    )
    return found


def moments(mixture, temperature=1.0):
    """Mean (d,) and covariance (d, d) in closed form, of components that much narrower."""
    w, mu = mixture.log_weights.exp(), mixture.means
    mean = w @ mu
    second = temperature**2 * mixture.cholesky @ mixture.cholesky.mT + mu[:, :, None] * mu[:, None]
    return mean, (w[:, None, None] * second).sum(0) - torch.outer(mean, mean)


def test_new_mixture_is_the_standard_normal(rng):
    z = torch.randn(7, 3, generator=rng, dtype=torch.float64)
    expected = torch.distributions.Normal(0, 1).log_prob(z).sum(1)
    torch.testing.assert_close(GaussianMixture(4, 3).double().log_prob(z), expected)


def test_log_prob_against_scipy(mixture, rng):
    z = 2 * torch.randn(4, 5, 2, generator=rng, dtype=torch.float64)
    covariances = mixture.cholesky @ mixture.cholesky.mT
    parts = (mixture.log_weights.exp(), mixture.means, covariances)
    each = zip(*(part.numpy() for part in parts), strict=True)
    density = sum(w * multivariate_normal(m, c).pdf(z.numpy()) for w, m, c in each)
    torch.testing.assert_close(mixture.log_prob(z), torch.from_numpy(np.log(density)))


def test_integrates_to_one(mixture):
    """By the trapezoidal rule, which is exact to rounding for smooth functions that vanish."""
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    for density in (mixture, mixture.tempered(0.6)):
        values = density.log_prob(torch.cartesian_prod(axis, axis)).exp()
        assert float(values.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sample_moments(mixture, temperature, rng):
    """4 standard errors of means and of a linear statistic's second moment."""
    n = 60_000
    density = mixture.tempered(temperature)
    z = density.sample((n // 3, 3), generator=rng)
    assert z.shape == (n // 3, 3, 2) and z.dtype == torch.float64
    z, (mean, covariance) = z.view(n, 2), moments(mixture, temperature)
    assert ((z.mean(0) - mean).abs() < 4 * (covariance.diagonal() / n).sqrt()).all()
    centred = z - mean
    products = centred[:, :, None] * centred[:, None]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(n)).all()


def test_samples_visit_components_by_weight(mixture, rng):
    n = 20_000
    narrow = mixture.tempered(1e-3).sample((n,), generator=rng)
    nearest = torch.cdist(narrow, mixture.means).argmin(1)
    shares, weights = torch.bincount(nearest) / n, mixture.log_weights.exp()
    assert ((shares - weights).abs() < 4 * (weights * (1 - weights) / n).sqrt()).all()


@pytest.mark.parametrize("num", [1, 511, 1100])
def test_density_of_many_numbers(num, rng, monkeypatch):
    """Block by block, in single precision, and its gradient, against torch's own mixture."""
    monkeypatch.setattr("ncprior.priors.expectation.NUMBERS_AT_ONCE", 1)
    components, size = 7, 5
    cholesky = torch.eye(size) + 0.3 * torch.randn(components, size, size, generator=rng).tril()
    mixture = GaussianMixture(components, size)
    weights = torch.randn(components, generator=rng).log_softmax(0)
    mixture.set(weights, 2 * torch.randn(components, size, generator=rng), cholesky)
    parts = MultivariateNormal(mixture.means, scale_tril=cholesky)
    known = MixtureSameFamily(Categorical(logits=weights), parts)
    z = (2 * torch.randn(num, size, generator=rng)).requires_grad_()
    found, expected = mixture.log_prob(z), known.log_prob(z)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    slopes = [torch.autograd.grad(each.sum(), z)[0] for each in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)
    at_mean = mixture.means.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixture.log_prob(at_mean).sum(), at_mean)
    assert torch.isfinite(slope).all()


def test_blocks_change_no_fit(rng, monkeypatch):
    codes = Codes(torch.randn(1300, 3, generator=rng).abs(), torch.full((1300, 3), 0.2))
    start = clusters(codes, 6, seed=0)
    whole, *of_whole = expectation_maximisation(codes, start, max_iter=7, tol=0)
    monkeypatch.setattr("ncprior.priors.expectation.NUMBERS_AT_ONCE", 1)
    blocks, *of_blocks = expectation_maximisation(codes, start, max_iter=7, tol=0)
    assert of_blocks == pytest.approx(of_whole, abs=1e-5)
    for found, expected in zip(blocks, whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_iterations_with_few_components_end_where_all_do(scale, rng, monkeypatch):
    loc = torch.randn(600, 4, generator=rng) * torch.randint(1, 4, (600, 1), generator=rng)
    codes = Codes(loc, torch.full_like(loc, scale))
    start = clusters(codes, 8, seed=0)
    _, iterations, bound = expectation_maximisation(codes, start, max_iter=2000, tol=1e-6)
    assert iterations > 10
    monkeypatch.setattr("ncprior.priors.expectation.ALL_EVERY", 1)
    _, _, of_all = expectation_maximisation(codes, start, max_iter=2000, tol=1e-6)
    assert bound == pytest.approx(of_all, abs=1e-3)


def test_temperature_one_is_itself(mixture):
    assert mixture.tempered(1.0) is mixture
    assert mixture.sample((), generator=torch.Generator()).shape == (2,)


def test_fit_is_that_of_scikit_learn(mixture, rng):
    codes = mixture.sample((600,), generator=rng)
    expected = Fit(3, max_iter=2000, tol=1e-9, random_state=0).fit(codes.numpy())
    found = GaussianMixture.fit(codes, 3, tol=1e-9).double()
    # Parameters are kept in single precision.
    torch.testing.assert_close(
        found.log_prob(codes), torch.from_numpy(expected.score_samples(codes)), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(5, 2), "codes must be at least 10, one for each component, got 5"),
        (torch.zeros(20), r"codes must be two tensors \(n, d\)"),
        (torch.full((20, 2), math.nan), "codes must be finite"),
    ],
)
def test_codes_that_cannot_be_fitted(codes, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture.fit(codes)


def test_config_makes_the_same_shape(mixture):
    other = GaussianMixture(**mixture.config).double()
    other.load_state_dict(mixture.state_dict())
    z = torch.zeros(1, 2, dtype=torch.float64)
    assert other.event_shape == (2,) and other.batch_shape == ()
    torch.testing.assert_close(other.log_prob(z), mixture.log_prob(z), rtol=0, atol=0)


def test_whole_posteriors_count(rng):
    """One component: mean and covariance of q(z) are known, the mean noise being part of it."""
    codes = Codes(torch.randn(500, 3, generator=rng), torch.rand(500, 3, generator=rng) + 0.5)
    found = GaussianMixture.fit(codes, 1)
    covariance = torch.cov(codes.loc.T, correction=0) + codes.scale.square().mean(0).diag()
    torch.testing.assert_close(found.means[0], codes.loc.mean(0), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        found.cholesky[0] @ found.cholesky[0].T, covariance, rtol=0, atol=1e-5
    )


def test_every_iteration_raises_the_bound(rng):
    """And with codes that have no scale it is the log-likelihood itself."""
    loc = torch.randn(400, 3, generator=rng).abs()
    bounds: list[float] = []
    for scale in (0.3, 0.0):
        codes = Codes(loc, torch.full_like(loc, scale))
        bounds = []
        for iterations in range(1, 12):
            start = clusters(codes, 4, seed=0)
            *_, bound = expectation_maximisation(codes, start, max_iter=iterations, tol=-1)
            bounds.append(bound)
        assert all(b > a - 1e-5 for a, b in itertools.pairwise(bounds))
        assert bounds[-1] > bounds[0] + 0.01
    found = GaussianMixture.fit(codes, 4, max_iter=10, tol=-1)  # the bound is that before a step
    assert float(found.log_prob(loc).mean()) == pytest.approx(bounds[-1], abs=1e-4)


def test_noise_is_not_taken_for_structure(rng):
    """Latents that the encoder leaves at the prior: draws of them over-fit, posteriors do not."""
    used = torch.randn(400, 1, generator=rng)
    used = 0.95 * used.sign() + 0.01 * used
    unused = torch.zeros(400, 9)
    scale = torch.cat([torch.full_like(used, 0.3), torch.ones_like(unused)], 1)
    codes = Codes(torch.cat([used, unused], 1), scale)
    fresh = codes.draw(5000, generator=rng)
    of_draws = GaussianMixture.fit(codes.each(generator=rng), 10)
    of_posteriors = GaussianMixture.fit(codes, 10)
    gained = of_posteriors.log_prob(fresh) - of_draws.log_prob(fresh)
    assert float(gained.mean()) > 0.5


def test_auto_takes_the_number_that_held_out_codes_choose(rng, monkeypatch):
    """Draws of two far components: three sizes are worth trying, the fourth over-fits."""
    sizes = []
    monkeypatch.setattr("ncprior.priors.mixture.SIZES", (1, 2, 60, 70))
    z = torch.randn(300, 2, generator=rng)
    z[::2, 0] += 12
    found = GaussianMixture.fit(
        z, "auto", report=lambda _, figures: sizes.append(figures["log_prob"])
    )
    assert len(found.means) == 2 and len(sizes) == 4
    assert sizes[2] > sizes[1] > sizes[0]  # of what they were fitted to
    # A step on all codes gives the mixture their mean, one on nine tenths does not.
    mean = found.log_weights.exp() @ found.means
    torch.testing.assert_close(mean, z.mean(0), rtol=0, atol=1e-4)


def test_auto_on_few_codes(rng):
    """Sizes that there are too few codes for are not tried."""
    assert len(GaussianMixture.fit(torch.randn(25, 2, generator=rng), "auto").means) == 10


@pytest.mark.parametrize("components", [0, 2.5, "many"])
def test_components_are_checked(components, rng):
    with pytest.raises(ValueError, match="components must be a whole number of at least 1, or au"):
        GaussianMixture.fit(torch.randn(25, 2, generator=rng), components)
