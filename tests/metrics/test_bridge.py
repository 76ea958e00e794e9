import math

import pytest
import torch

from ncprior.metrics.bridge import bridge_log_z


def tilted(rng, a, base, chains, draws):
    """log r = a z at draws of N(0, 1) and of N(a, 1); log Z = a^2 / 2."""
    z = torch.randn(base, generator=rng, dtype=torch.float64)
    moved = a + torch.randn(chains, draws, generator=rng, dtype=torch.float64)
    return a * z, a * moved


@pytest.mark.parametrize("a", [0.5, 2.0, 4.0])
def test_tilted_gaussian(a, rng):
    found = bridge_log_z(*tilted(rng, a, 4000, 1000, 2))
    assert abs(found.value - a**2 / 2) < 4 * found.se
    assert found.num == 6000 and found.k_hat is None  # no weights, no tail


def test_it_is_the_optimal_bridge(rng):
    """Its variance is that of Meng and Wong's optimal function for independent draws.

    n var(log Z) = 1 / (s0 s1) (1 / I - 1), with I the integral of p q / (s0 p + s1 q), by a grid.
    """
    a, m, n = 1.5, 300, 500
    line = torch.linspace(-10, 12, 4001, dtype=torch.float64)
    p, q = ((-0.5 * (line - at).square()).exp() / math.sqrt(2 * math.pi) for at in (0.0, a))
    s0, s1 = m / (m + n), n / (m + n)
    overlap = float(torch.trapezoid(p * q / (s0 * p + s1 * q), line))
    exact = math.sqrt((1 / overlap - 1) / (s0 * s1 * (m + n)))
    found = [bridge_log_z(*tilted(rng, a, m, n, 1)) for _ in range(400)]
    values = torch.tensor([f.value for f in found])
    assert float(values.std()) == pytest.approx(exact, rel=4 / math.sqrt(800))
    stated = torch.tensor([f.se for f in found]).square().mean().sqrt()
    assert float(stated) == pytest.approx(exact, rel=0.03)


def test_draws_that_depend_on_each_other_count_once(rng):
    """Ten equal draws per chain: the stated error is that of one, and it is the real one."""
    found, apart = [], []
    for _ in range(300):
        at_base, at_target = tilted(rng, 1.0, 2000, 100, 1)
        copies = at_target.expand(-1, 10)
        found.append(bridge_log_z(at_base, copies))
        apart.append(bridge_log_z(at_base, copies.reshape(-1, 1)))
    assert found[0].value == pytest.approx(apart[0].value, abs=1e-9)
    spread = torch.tensor([f.value for f in found]).std()
    stated, naive = (torch.tensor([f.se for f in each]).mean() for each in (found, apart))
    assert float(stated / spread) == pytest.approx(1, abs=4 / math.sqrt(600))
    assert naive < 0.6 * stated


def test_weights_stand_for_repeated_chains(rng):
    at_base, at_target = tilted(rng, 1.0, 1000, 100, 3)
    counts = torch.tensor([1, 2] * 50)
    weighted = bridge_log_z(at_base, at_target, counts.double().log())
    # The shares of draws enter the bridge, so that both must have 100 chains of 3 per 1000.
    repeated = bridge_log_z(at_base.repeat(2), at_target.repeat_interleave(counts, 0)[:, :3])
    assert weighted.value == pytest.approx(repeated.value, abs=0.3 * weighted.se)
    assert weighted.value != pytest.approx(bridge_log_z(at_base, at_target).value, abs=1e-4)


def test_no_overlap_is_said(rng):
    found = bridge_log_z(*tilted(rng, 12.0, 1000, 1000, 1))
    assert found.se > 0.5


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        (torch.zeros(5), torch.zeros(5), "at_target \\(chains, draws\\)"),
        (torch.zeros(5), torch.zeros(1, 5), "two chains"),
        (torch.tensor([0.0, math.nan]), torch.zeros(2, 1), "NaN or \\+inf"),
    ],
)
def test_arguments(base, target, message):
    with pytest.raises(ValueError, match=message):
        bridge_log_z(base, target)
