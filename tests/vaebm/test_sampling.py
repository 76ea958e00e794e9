import math

import pytest
import torch
from toys import TwoGroups

from ncprior.generation import draw
from ncprior.priors import GaussianMixture
from ncprior.vaebm import EnergyNetwork, ImageEnergy, draw_with_energy

from .models import SIGMA, C, Quadratic, exact_law, linear_vae, tilted_prior

N = 3000


def energy_of(network, **options):
    return ImageEnergy(network.double(), **({"langevin_steps": 60, "step_size": 0.2} | options))


def check_moments(draws, law, pixel_noise=True):
    """Latents and images have the moments of a normal law of (z, eps) of each pixel, (2, 2)."""
    mean, covariance = law
    gain = torch.tensor([C, SIGMA if pixel_noise else 0.0], dtype=torch.float64)
    z, x = draws.latents[0].flatten(), draws.images.double().flatten() - 0.5
    variance = float(gain @ covariance @ gain)
    cases = [(z, float(mean[0]), float(covariance[0, 0])), (x, float(gain @ mean), variance)]
    for values, expected, of_variance in cases:
        n = len(values)  # pixels are independent; 4 standard errors
        assert abs(float(values.mean()) - expected) < 4 * math.sqrt(of_variance / n)
        assert abs(float(values.var()) - of_variance) < 4 * of_variance * math.sqrt(2 / n)
    both = float(covariance[0] @ gain)
    found = float(torch.stack([z, x]).cov()[0, 1])
    error = math.sqrt((float(covariance[0, 0]) * variance + both**2) / len(z))
    assert abs(found - both) < 4 * error


@pytest.mark.parametrize("k", [1000.0])
@pytest.mark.parametrize("tilt", [0.0, 0.5])
def test_target_is_the_normal_one(k, tilt):
    """E = (k / 2)|x - t|^2 and log r = a z on a linear VAE: p r exp(-E) is normal.

    The uncorrected dynamics shift its covariance by a known factor; 0.9^60 = 0.002 of the start is
    left in the slowest direction. k = 1000 has a curvature of 4.1, where 0.2 is no tiny step.
    """
    prior = tilted_prior(tilt) if tilt else None
    draws = draw_with_energy(
        linear_vae(), prior, energy_of(Quadratic(k)), N, proposals=50, batch_size=3000
    )
    check_moments(draws, exact_law(k, tilt=tilt, eta=0.2))


def test_tiny_steps_reach_the_target_itself():
    """With a step of 0.05 the bias of the covariance, below 2 %, is below the standard error."""
    energy = energy_of(Quadratic(100.0), step_size=0.05, langevin_steps=150)
    check_moments(draw_with_energy(linear_vae(), None, energy, 1000), exact_law(100.0))


@pytest.mark.parametrize("steps", [1, 7])
def test_short_run_step_by_step(steps):
    """The start is a draw of the prior with fresh pixel noise, and each step is the update."""
    energy = energy_of(Quadratic(600.0), langevin_steps=steps, step_size=0.3)
    draws = draw_with_energy(linear_vae(), None, energy, N, seed=1)
    check_moments(draws, exact_law(600.0, steps=steps, eta=0.3))


def test_means_without_pixel_noise():
    energy = energy_of(Quadratic(400.0), pixel_noise=False)
    draws = draw_with_energy(linear_vae(), None, energy, N)
    check_moments(draws, exact_law(400.0, pixel_noise=False, eta=0.2), pixel_noise=False)


def test_base_that_is_not_standard():
    """A mixture of one component N(0.8, 0.6^2): z itself moves."""
    base = GaussianMixture(1, 2)
    base.means += 0.8
    base.cholesky *= 0.6
    base.precision /= 0.6
    vae = linear_vae().with_prior(base.double())
    energy = energy_of(Quadratic(400.0))
    draws = draw_with_energy(vae, None, energy, N)
    check_moments(draws, exact_law(400.0, mean=0.8, spread=0.6, eta=0.2))


def test_no_energy_leaves_the_prior():
    """Fresh networks are zero: the law of z stays N(0, 1), up to the factor 1 / (1 - eta / 4)."""
    energy = energy_of(EnergyNetwork((1, 1, 2), channels=(4,)), step_size=0.02, langevin_steps=20)
    draws = draw_with_energy(linear_vae(), None, energy, N)
    check_moments(draws, exact_law(0.0))


def test_no_energy_leaves_the_ncp():
    """exp(a z) N(0, 1) is N(a, 1): where SIR starts, the dynamics stay."""
    energy = energy_of(EnergyNetwork((1, 1, 2), channels=(4,)), step_size=0.02, langevin_steps=20)
    draws = draw_with_energy(linear_vae(), tilted_prior(0.5), energy, N, proposals=300)
    check_moments(draws, exact_law(0.0, tilt=0.5))


def test_hierarchical_vae():
    """Two groups of normal priors without energy: the law of both latents stays."""
    vae = TwoGroups(size=2).eval().requires_grad_(False)
    energy = energy_of(EnergyNetwork((1, 1, 2), channels=(4,)), step_size=0.02, langevin_steps=20)
    draws = draw_with_energy(vae, None, energy, N)
    z1, z2 = (z.flatten() for z in draws.latents)
    variance, n = float(vae.b**2) + vae.s**2, 2 * N
    # 4 standard errors; the dynamics add eta / 4 = 0.5 % of the variance at most.
    assert abs(float(z1.var()) - 1) < 4 * math.sqrt(2 / n) + 0.005
    assert abs(float(z2.var()) - variance) < 4 * variance * math.sqrt(2 / n) + 0.005 * variance
    covariance = float(torch.stack([z1, z2]).cov()[0, 1])
    error = math.sqrt((variance + float(vae.b**2)) / n)
    assert abs(covariance - float(vae.b)) < 4 * error + 0.005


def test_a_draw_depends_on_its_number_alone():
    vae, energy = linear_vae(), energy_of(Quadratic(100.0), langevin_steps=3)
    whole = draw_with_energy(vae, None, energy, 7, seed=3)
    part = draw_with_energy(vae, None, energy, 4, seed=3, first=2, batch_size=3)
    torch.testing.assert_close(part.images, whole.images[2:6], rtol=0, atol=1e-12)
    other = draw_with_energy(vae, None, energy, 7, seed=4)
    assert not torch.allclose(other.images, whole.images)


def test_starts_are_those_of_the_prior():
    """A vanishing step leaves latents where `draw` puts them."""
    vae, energy = linear_vae(), energy_of(Quadratic(1.0), langevin_steps=1, step_size=1e-20)
    found = draw_with_energy(vae, None, energy, 5, seed=2)
    torch.testing.assert_close(found.latents[0], draw(vae, None, 5, seed=2).latents[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.7}, "temperature cannot be used with an energy"),
        ({"batch_norm_passes": 5}, "batch_norm_passes cannot be used"),
        ({"num": 0}, "num must be positive"),
        ({"step_size": -1.0}, "must be positive"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        draw_with_energy(linear_vae(), None, energy_of(Quadratic(1.0)), **({"num": 2} | options))
