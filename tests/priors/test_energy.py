import math

import pytest
import torch

from ncprior.priors.codes import Codes
from ncprior.priors.energy import EnergyPrior, energy_distance


def linear_energy(a, **options):
    """E(z) = -a z in one dimension, by a unit that never leaves its linear part."""
    prior = EnergyPrior(1, hidden=(1,), **options).double().eval().requires_grad_(False)
    prior.network[0].weight.fill_(1.0)
    prior.network[0].bias.fill_(1000.0)
    prior.network[2].weight.fill_(-a)
    prior.network[2].bias.fill_(1000 * a)
    return prior


@pytest.mark.parametrize("steps", [1, 5, 60])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_short_run_has_the_law_of_its_recursion(steps, temperature, rng):
    """On a normal density tilted linearly the law stays normal: its moments step by step."""
    a, s, n = 0.8, 0.4, 40_000
    prior = linear_energy(a, langevin_steps=steps, step_size=s).tempered(temperature)
    mean, variance = 0.0, temperature**2
    for _ in range(steps):
        shrink = 1 - 0.5 * s**2 / temperature**2
        mean, variance = shrink * mean + 0.5 * s**2 * a, shrink**2 * variance + s**2
    z = prior.sample((n // 4, 4), generator=rng)
    assert z.shape == (n // 4, 4, 1) and z.dtype == torch.float64
    assert abs(float(z.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(z.var()) - variance) < 4 * variance * math.sqrt(2 / n)


def test_density_and_log_z_in_closed_form(rng):
    """exp(a z) N(0, 1) is N(a, 1) times exp(a^2 / 2)."""
    a = 0.8
    prior, z = linear_energy(a), torch.linspace(-3, 3, 7, dtype=torch.float64)[:, None]
    expected = torch.distributions.Normal(a, 1.0).log_prob(z[:, 0]) + a**2 / 2
    torch.testing.assert_close(prior.unnormalized_log_prob(z), expected)
    found = prior.estimate_log_z(50_000, generator=rng)
    assert abs(found.value - a**2 / 2) < 4 * found.se


def test_slope_by_hand_is_that_of_autograd(rng):
    prior = EnergyPrior(3, hidden=(16, 8)).double()
    x = torch.randn(20, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(prior.energy(x).sum(), x)
    torch.testing.assert_close(prior._slope(x.detach()), expected)


def test_fit_recovers_a_tilted_normal():
    """Codes from N(0.7, 0.8^2): the short runs draw from it, and the energy slopes towards it."""
    shift, spread, n = 0.7, 0.8, 4000
    noise = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    codes = Codes(shift + 0.8 * spread * noise, torch.full_like(noise, 0.6 * spread))
    prior = EnergyPrior.fit(
        codes, matched=False, hidden=(32, 32), steps=200, learning_rate=5e-3, heldout=0.2
    )
    z = prior.sample((n,), generator=torch.Generator().manual_seed(2))
    # 0.016 is one standard error of each mean, of the codes and of the draws.
    assert float((z.mean(0) - shift).abs().max()) < 0.08
    assert float((z.std(0) - spread).abs().max()) < 0.08
    at = torch.tensor([[0.7, 0.7], [-0.7, -0.7]])
    higher, lower = prior.unnormalized_log_prob(at).tolist()
    true = torch.distributions.Normal(shift, spread).log_prob(at).sum(1)
    assert higher - lower == pytest.approx(float(true[0] - true[1]), rel=0.3)
    assert not prior.training


def test_energy_distance_by_hand():
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[2.0], [5.0]])
    # Across: 2, 5, 1, 4; within: 1 and 3.
    assert energy_distance(x, y) == pytest.approx(2 * 3 - 1 - 3)


def test_rows_under_a_vae():
    """The gradient is that of E at the codes less that at the runs."""
    prior = linear_energy(0.5).requires_grad_(True).train()
    z = torch.tensor([[0.2], [0.4]], dtype=torch.float64, requires_grad=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        value = prior.rows(2).log_prob(z)
        torch.manual_seed(0)
        runs = prior.sample((2,))
    bias, weight, at = torch.autograd.grad(
        value.mean(), [prior.network[2].bias, prior.network[2].weight, z]
    )
    assert abs(float(bias)) < 1e-12
    expected = float((runs.mean() - z.mean()).detach())
    assert float(weight) == pytest.approx(expected)
    torch.testing.assert_close(at, 0.5 * (0.5 - z.detach()))
    prior.eval()
    found = prior.rows(2).log_prob(z)
    expected = torch.distributions.Normal(0.5, 1.0).log_prob(z[:, 0])
    # Z comes from 16,384 draws; their relative spread is sqrt(exp(0.25) - 1).
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 0.54 / 128)


@pytest.mark.parametrize("setting", [{"langevin_steps": 0}, {"step_size": 0.0}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        EnergyPrior(2, **setting)
