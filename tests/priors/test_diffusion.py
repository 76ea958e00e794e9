import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from ncprior.priors.codes import Codes
from ncprior.priors.diffusion import DiffusionPrior, matching_loss


def gaussian(covariance, **options):
    """The prior whose velocity is that of N(0, covariance)."""
    prior = DiffusionPrior(len(covariance), width=4, blocks=1, **options).double().eval()
    values, axes = torch.linalg.eigh(covariance)
    prior.variances.copy_(values)
    prior.axes.copy_(axes)
    return prior


COVARIANCE = torch.tensor(
    [[1.5, 0.3, -0.4], [0.3, 0.5, 0.1], [-0.4, 0.1, 0.9]], dtype=torch.float64
)


@pytest.fixture(scope="module")
def two_blobs():
    """Codes in the plane whose q(z) has two modes, and a prior fitted to them."""
    generator = torch.Generator().manual_seed(0)
    side = torch.randint(0, 2, (4000, 1), generator=generator) * 2.0 - 1
    loc = side * torch.tensor([1.5, 0.5]) + 0.3 * torch.randn(4000, 2, generator=generator)
    codes = Codes(loc.double(), torch.full_like(loc, 0.4).double())
    with torch.random.fork_rng():
        prior = DiffusionPrior.fit(
            codes, width=32, blocks=1, solver_steps=10, steps=400, learning_rate=1e-2
        )
    return codes, prior


def test_density_of_a_gaussian(rng):
    """With the exact velocity only the solver's error is left, which is of fourth order."""
    z = torch.randn(30, 3, generator=rng, dtype=torch.float64)
    expected = MultivariateNormal(torch.zeros(3).double(), COVARIANCE).log_prob(z)
    errors = [
        float((gaussian(COVARIANCE, solver_steps=steps).log_prob(z) - expected).abs().max())
        for steps in (16, 32, 64)
    ]
    assert errors[0] < 1e-2
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(16, rel=0.3)


def test_samples_of_a_gaussian(rng):
    """4.5 standard errors of products of normals: their variance is c_ii c_jj + c_ij^2."""
    n = 20_000
    z = gaussian(COVARIANCE).sample((n // 4, 4), generator=rng)
    assert z.shape == (n // 4, 4, 3) and z.dtype == torch.float64
    z, diagonal = z.view(n, 3), COVARIANCE.diagonal()
    se = ((diagonal[:, None] * diagonal + COVARIANCE**2) / n).sqrt()
    assert ((z.T @ z / n - COVARIANCE).abs() < 4.5 * se + 1e-3).all()
    assert (z.mean(0).abs() < 4.5 * (diagonal / n).sqrt()).all()


def test_probes_estimate_the_divergence(rng):
    """Unbiased, with the error they claim; without error where the Jacobian is diagonal."""
    z = torch.randn(200, 3, generator=rng, dtype=torch.float64)
    exact = gaussian(COVARIANCE).log_prob(z)
    found = gaussian(COVARIANCE).estimate_log_prob(z, generator=rng, probes=64)
    standard = (found.value - exact) / found.se
    # Mean and mean square of 200 values that are nearly t-distributed with 63 degrees of freedom.
    assert abs(float(standard.mean())) < 4.5 / math.sqrt(200)
    assert float(standard.square().mean()) == pytest.approx(1.03, abs=4.5 * math.sqrt(2.2 / 200))
    diagonal = COVARIANCE.diagonal().diag()
    found = gaussian(diagonal).estimate_log_prob(z, generator=rng, probes=2)
    torch.testing.assert_close(found.value, gaussian(diagonal).log_prob(z))
    assert float(found.se.max()) < 1e-12


def test_log_prob_with_probes_is_the_same_each_time(rng):
    z = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    prior = gaussian(COVARIANCE, probes=2)
    assert torch.equal(prior.log_prob(z), prior.log_prob(z))
    assert DiffusionPrior(16).probes == 0 and DiffusionPrior(17).probes > 0


def test_before_training_it_is_the_gaussian_of_the_codes(rng):
    loc = torch.randn(500, 3, generator=rng, dtype=torch.float64) @ COVARIANCE + 2
    codes = Codes(loc, torch.full_like(loc, 0.3))
    prior = DiffusionPrior(3, width=4, blocks=1).double()
    prior.standardize(codes)
    covariance = torch.cov(loc.T, correction=0) + 0.09 * torch.eye(3)
    expected = MultivariateNormal(loc.mean(0), covariance).log_prob(loc)
    # 16 steps leave a relative error of 1e-4.
    torch.testing.assert_close(prior.log_prob(loc), expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(prior.outer(prior.inner(loc)), loc)


def test_codes_on_a_line_stay_finite(rng):
    """Deterministic codes without any spread across a line."""
    loc = torch.randn(50, 1, generator=rng) * torch.tensor([1.0, 2.0])
    prior = DiffusionPrior(2, width=4, blocks=1)
    prior.standardize(Codes(loc, torch.zeros_like(loc)))
    z = prior.sample((500,), generator=rng)
    # What is left across the line is 2 sqrt(2e-5) = 0.009: five of them, and the solver's error.
    torch.testing.assert_close(z[:, 1], 2 * z[:, 0], rtol=0, atol=0.06)


def test_fitted_density_integrates_to_one(two_blobs):
    """By the trapezoidal rule; what is missing is the solver's error."""
    _, prior = two_blobs
    axis = torch.linspace(-4, 4, 49, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    for density in (prior, prior.tempered(0.8)):
        total = float(density.log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2)
        assert total == pytest.approx(1, abs=0.01)


def test_fit_is_close_to_the_codes_and_to_its_own_samples(two_blobs, rng):
    codes, prior = two_blobs
    n = 2000
    q, p = codes.draw(n, generator=rng), prior.sample((n,), generator=rng)
    side = torch.tensor([1.5, 0.5], dtype=torch.float64)
    centred = torch.stack([Normal(s * side, 0.5).log_prob(q).sum(1) for s in (-1.0, 1.0)])
    truth = centred.logsumexp(0) - math.log(2)
    divergence = float((truth - prior.log_prob(q)).mean())
    assert -0.02 < divergence < 0.05  # in nats; a Gaussian is 0.6 off
    # The entropy that the density has at its own draws is that of q, up to 4.5 standard errors
    # of the two means and what the divergence allows.
    own, at_q = prior.log_prob(p), truth
    se = math.sqrt(float(own.var() + at_q.var()) / n)
    assert abs(float(own.mean() - at_q.mean())) < 4.5 * se + 0.1
    right = float((p[:, 0] > 0).double().mean())
    assert abs(right - 0.5) < 4.5 * 0.5 / math.sqrt(n) + 0.03
    assert not prior.training


def test_temperature_scales_a_gaussian(rng):
    """The flow of a Gaussian is linear: its draws shrink by the temperature."""
    prior = gaussian(COVARIANCE)
    cool = prior.tempered(0.5)
    draw = [p.sample((4,), generator=torch.Generator().manual_seed(0)) for p in (prior, cool)]
    torch.testing.assert_close(draw[1], 0.5 * draw[0])
    torch.testing.assert_close(
        cool.log_prob(draw[1]), prior.log_prob(draw[0]) + 3 * math.log(2), rtol=0, atol=1e-9
    )
    assert prior.tempered(1.0) is prior and prior.temperature == 1


def test_loss_vanishes_for_one_gaussian(rng):
    """One posterior is all there is: its velocity is that of every x."""
    variances = torch.tensor([0.25, 1.5], dtype=torch.float64)
    scale = variances.sqrt().expand(100, 2)
    exact = gaussian(variances.diag())
    loss = matching_loss(exact.velocity, torch.zeros_like(scale), scale, generator=rng)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("scale", [0.0, 0.6])
def test_loss_is_least_at_the_exact_velocity(scale, rng):
    """Posteriors N(m, s^2) with m from N(0, 1 - s^2) make N(0, 1), whose velocity is zero.

    Any other costs its mean square more, which for a linear one is that of its rate over angles;
    4.5 standard errors of a mean of products of the two, whose variances are at most 1 and 3.
    """
    n = 100_000
    loc = math.sqrt(1 - scale**2) * torch.randn(n, 1, generator=rng, dtype=torch.float64)
    other = gaussian(torch.tensor([[0.5]]).double())
    seeded = [torch.Generator().manual_seed(1) for _ in range(2)]
    scales = torch.full_like(loc, scale)
    least = matching_loss(lambda x, angle: 0 * x, loc, scales, generator=seeded[0])
    found = matching_loss(other.velocity, loc, scales, generator=seeded[1])
    angle = (torch.arange(1000) + 0.5).double() * (math.pi / 2000)
    rate = other.velocity(torch.ones(1000, 1).double(), angle)
    more = float(rate.square().mean().detach())
    tolerance = 4.5 * math.sqrt((4 * more + 3 * more**2) / n)
    assert more > 0.05 > 2 * tolerance
    assert float((found - least).detach()) == pytest.approx(more, abs=tolerance)


def test_gradient_of_the_density(rng):
    z = torch.randn(4, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gaussian(COVARIANCE).log_prob(z).sum(), z)
    expected = -torch.linalg.solve(COVARIANCE, z.detach().T).T
    torch.testing.assert_close(gradient, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"width": 0}, "width, blocks and solver_steps"),
        ({"probes": -1}, "probes must be at least 0"),
        ({"temperature": 0.0}, "temperature positive"),
    ],
)
def test_settings_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        DiffusionPrior(2, **setting)
