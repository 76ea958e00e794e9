import math

import pytest
import torch

from ncprior.metrics.annealing import Schedule, anneal, tuned_schedule
from ncprior.normal import LOG_2_PI
from ncprior.numerics import log_z


def log_base(z):
    return -0.5 * (z.square() + LOG_2_PI).sum(1)


def schedule(*betas, size=0.5):
    return Schedule(torch.tensor(betas), torch.full((len(betas),), size))


def draw(n, d, rng):
    return torch.randn(n, d, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("leapfrog", [1, 3])
def test_moves_leave_their_density_as_it_is(leapfrog, rng):
    """Draws of N(0, I) stay so through 30 moves as long as a third is refused; without refusals
    their variance would be 1 / (1 - size^2 / 4), or endless."""
    n = 8000
    found = anneal(
        log_base,
        lambda z: 0 * z.sum(1),
        draw(n, 2, rng),
        schedule(1.0, size=1.4),
        leapfrog=leapfrog,
        further=30,
        generator=rng,
    )
    assert 0.4 < float(found.acceptance) < 0.95
    assert (found.ends.mean(0).abs() < 4 / math.sqrt(n)).all()
    assert ((found.ends.var(0) - 1).abs() < 4 * math.sqrt(2 / n)).all()
    assert found.log_weights.abs().max() == 0 and found.along.shape == (n, 30)


def test_a_tilt_far_from_the_base(rng):
    """log r = a sum(z): log Z = d a^2 / 2 = 9, and the weighted ends are N(a, I)."""
    a, d = 3.0, 2
    densities = (log_base, lambda z: a * z.sum(1))
    plan = tuned_schedule(*densities, draw(64, d, rng), 30, generator=rng)
    found = anneal(*densities, draw(2000, d, rng), plan, generator=rng)
    z = log_z(found.log_weights)
    assert z.se < 0.04 and abs(z.value - d * a**2 / 2) < 4 * z.se
    weights = found.log_weights.softmax(0)
    error = 4 * float(weights.square().sum().sqrt())
    assert ((weights @ found.ends - a).abs() < error).all()


def test_one_temperature_is_importance_sampling(rng):
    start = draw(50, 2, rng)
    found = anneal(log_base, lambda z: z[:, 0], start, schedule(1.0), generator=rng)
    torch.testing.assert_close(found.log_weights, start[:, 0])


def test_the_schedule_is_even_in_length(rng):
    """log r = -k z^2 / 2 spreads by sqrt(1/2) k / (1 + k beta): betas are even in log(1 + k beta).

    64 chains know a spread to 9 %, and neighbours along the path err alike: 4 of that.
    """
    k, count = 99.0, 20
    plan = tuned_schedule(
        log_base, lambda z: -0.5 * k * z[:, 0].square(), draw(64, 1, rng), count, generator=rng
    )
    assert plan.betas[-1] == 1 and (plan.betas.diff() > 0).all()
    length = (1 + k * plan.betas).log() / math.log(1 + k)
    even = torch.arange(1, count + 1) / count
    assert (length - even).abs().max() < 0.36 / 2
    assert plan.step_sizes[0] > 3 * plan.step_sizes[-1]  # scales 1 and 0.1


def test_a_constant_ratio_needs_no_schedule(rng):
    plan = tuned_schedule(log_base, lambda z: 0 * z[:, 0] + 2, draw(64, 1, rng), 4, generator=rng)
    torch.testing.assert_close(plan.betas, (torch.arange(1, 5) / 4).double())
    found = anneal(log_base, lambda z: 0 * z[:, 0] + 2, draw(5, 1, rng), plan, generator=rng)
    torch.testing.assert_close(found.log_weights, torch.full((5,), 2.0, dtype=torch.float64))


def test_arguments(rng):
    with pytest.raises(ValueError, match="at least one temperature"):
        anneal(log_base, log_base, draw(3, 1, rng), schedule(), generator=rng)
    with pytest.raises(ValueError, match="not finite at a draw of the base"):
        anneal(log_base, lambda z: z[:, 0] / 0, draw(3, 1, rng), schedule(1.0), generator=rng)
