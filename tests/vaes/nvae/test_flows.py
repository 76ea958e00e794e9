import math

import pytest
import torch

from ncprior.normal import Normal
from ncprior.vaes.nvae.flows import Flow, FlowedNormal


@pytest.fixture
def flow():
    """A flow that moves its input by much, as an untrained one would not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Flow(3, 2).double()
        for cell in made.cells:
            torch.nn.init.constant_(cell.shift.log_weight_norm, 0.5)
            torch.nn.init.normal_(cell.shift.bias)
    return made.requires_grad_(False)


@pytest.fixture
def posterior(flow, rng):
    loc, scale = torch.randn(2, 4, 3, 4, 4, generator=rng, dtype=torch.float64)
    return FlowedNormal(Normal(loc, scale.exp(), event_dim=3), flow)


def test_volume_is_kept(flow):
    z = torch.linspace(-2, 2, 3 * 3 * 3, dtype=torch.float64).view(1, 3, 3, 3)
    jacobian = torch.autograd.functional.jacobian(flow, z).view(27, 27)
    assert float(torch.linalg.det(jacobian)) == pytest.approx(1)
    assert (jacobian - torch.eye(27)).abs().max() > 0.1


def test_each_pair_looks_both_ways(flow):
    """The first and the last latent both depend on something."""
    z = torch.zeros(1, 3, 3, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow, z).view(3, 9, 27) != 0
    assert all(int(jacobian[1, pixel].sum()) > 1 for pixel in range(9))


def test_inverse_is_exact(flow, rng):
    z = 2 * torch.randn(4, 3, 4, 4, generator=rng, dtype=torch.float64)
    moved = flow(z)
    assert (moved - z).abs().max() > 0.5
    torch.testing.assert_close(flow.inverse(moved), z, rtol=0, atol=1e-12)


def test_log_prob_of_draws(posterior, rng):
    z, log_q = posterior.rsample_and_log_prob((2,), generator=rng)
    assert z.shape == (2, 4, 3, 4, 4) and log_q.shape == (2, 4)
    torch.testing.assert_close(posterior.log_prob(z), log_q)
    torch.testing.assert_close(posterior.row(1).log_prob(z[:, 1]), log_q[:, 1])
    assert posterior.batch_shape == (4,) and posterior.event_shape == (3, 4, 4)


def test_draws_are_those_of_the_base(posterior):
    generator = lambda: torch.Generator().manual_seed(3)
    z, _ = posterior.rsample_and_log_prob(generator=generator())
    torch.testing.assert_close(posterior.rsample(generator=generator()), z, rtol=0, atol=0)
    torch.testing.assert_close(posterior.sample(generator=generator()), z, rtol=0, atol=0)
    start = posterior.base.sample(generator=generator())
    torch.testing.assert_close(posterior.flow(start), z, rtol=0, atol=0)


def test_density_integrates_to_one(flow, rng):
    """By importance sampling from a normal twice as wide: 4 standard errors of its own."""
    n = 4000
    q = FlowedNormal(Normal(*torch.full((2, n, 3, 1, 1), 0.5).double(), event_dim=3), flow)
    spread = flow.inverse(torch.zeros(1, 3, 1, 1).double()).abs().max() + 4
    wide = Normal(torch.zeros(n, 3, 1, 1).double(), spread.expand(n, 3, 1, 1), event_dim=3)
    z = wide.sample(generator=rng)
    weights = (q.log_prob(z) - wide.log_prob(z)).exp()
    assert abs(weights.mean() - 1) < 4 * weights.std() / math.sqrt(n)
