import math

import pytest
import torch
from torch.distributions import Independent, kl_divergence
from torch.distributions import Normal as TorchNormal

from ncprior.normal import Normal, StandardNormal, bounded_normal


@pytest.fixture
def pair(rng):
    """Two densities over events (4, 2) for three rows, ours and those of torch."""
    found = []
    for _ in range(2):
        loc, raw = torch.randn(2, 3, 4, 2, generator=rng, dtype=torch.float64)
        found.append((Normal(loc, raw.exp(), 2), Independent(TorchNormal(loc, raw.exp()), 2)))
    return found


def test_speaks_the_language_of_torch(pair, rng):
    (ours, torchs), (other, torchs_other) = pair
    assert ours.batch_shape == torchs.batch_shape and ours.event_shape == torchs.event_shape
    z = torch.randn(5, 3, 4, 2, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(ours.log_prob(z), torchs.log_prob(z))
    torch.testing.assert_close(ours.kl(other), kl_divergence(torchs, torchs_other))


@pytest.mark.parametrize("event_dim", [1, 2])
def test_rows_that_share_a_scale(event_dim, rng):
    """An expanded scale, whose logarithm is taken once, gives what its copies give."""
    loc = torch.randn(5, 4, 3, generator=rng, dtype=torch.float64)
    scale = torch.rand(4, 3, generator=rng, dtype=torch.float64).expand(5, -1, -1)
    z = torch.randn(2, 5, 4, 3, generator=rng, dtype=torch.float64)
    found = Normal(loc, scale, event_dim).log_prob(z)
    torch.testing.assert_close(found, Independent(TorchNormal(loc, scale), event_dim).log_prob(z))


@pytest.mark.parametrize("event_dim", [1, 2, 3])
def test_draws_with_their_log_prob(event_dim, rng):
    """The same draws as `rsample`, differentiable, with the density that `log_prob` gives."""
    loc, raw = torch.randn(2, 5, 4, 3, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    density = Normal(loc, raw.exp(), event_dim)
    generator = lambda: torch.Generator().manual_seed(2)
    z, log_prob = density.rsample_and_log_prob((6,), generator=generator())
    assert torch.equal(z, density.rsample((6,), generator=generator()))
    assert log_prob.shape == (6, *density.batch_shape)
    torch.testing.assert_close(log_prob, density.log_prob(z))
    ours = torch.autograd.grad(log_prob.sum(), raw, retain_graph=True)
    torch.testing.assert_close(ours, torch.autograd.grad(density.log_prob(z).sum(), raw))


def test_bounds_are_soft_and_at_least_single(rng):
    x = torch.tensor([-1e9, -1.0, 0.0, 1.0, 1e9], dtype=torch.bfloat16).view(1, 5, 1, 1)
    found = bounded_normal(x, x)
    assert found.loc.dtype == found.scale.dtype == torch.float32 and found.event_dim == 3
    bounded = 5 * torch.tanh(x.float() / 5)
    torch.testing.assert_close(found.loc, bounded)
    torch.testing.assert_close(found.scale, bounded.exp() + 0.01)
    assert found.loc.abs().max() == 5 and bounded_normal(x.double(), x).loc.dtype == torch.float64


def test_gradient_flows_through_rsample_only():
    loc = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    density = Normal(loc, torch.full_like(loc, 2.0))
    assert not density.sample().requires_grad
    density.rsample().sum().backward()
    torch.testing.assert_close(loc.grad, torch.ones_like(loc))


def test_moments_and_temperature(rng):
    """4 standard errors for each of 3 coordinates."""
    n = 50_000
    loc = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    scale = torch.tensor([0.1, 1.0, 3.0], dtype=torch.float64)
    z = Normal(loc, scale).tempered(0.5).sample((n,), generator=rng)
    assert z.shape == (n, 3)
    assert ((z.mean(0) - loc).abs() < 4 * 0.5 * scale / math.sqrt(n)).all()
    assert ((z.var(0) / (0.5 * scale) ** 2 - 1).abs() < 4 * math.sqrt(2 / n)).all()


def test_row(pair):
    density, _ = pair[0]
    z = torch.zeros(4, 2, dtype=torch.float64)
    assert density.row(1).batch_shape == ()
    torch.testing.assert_close(density.row(1).log_prob(z), density.log_prob(z)[1])


def test_standard_normal_is_the_normal_of_its_name(rng):
    standard, z = StandardNormal(3).double(), torch.randn(5, 3, generator=rng, dtype=torch.float64)
    expected = TorchNormal(0.0, 1.0).log_prob(z).sum(1)
    for density in (standard, standard.rows(5), standard.tempered(1.0)):
        torch.testing.assert_close(density.log_prob(z), expected)
    assert standard.event_shape == (3,) and standard.rows(5).batch_shape == (5,)
    assert standard.tempered(0.3).scale.tolist() == [0.3] * 3
    draws = standard.sample((2, 4), generator=rng)
    assert draws.shape == (2, 4, 3) and draws.dtype == torch.float64
