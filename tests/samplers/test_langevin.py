import math

import pytest
import torch

from ncprior.samplers import langevin


def tilted(a=0.0):
    """log N(z; a, 1) up to a constant, as log p(z) + a z."""
    return lambda z: (-0.5 * z.square() + a * z).sum(-1)


def start(n, generator, d=1):
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def exact_variance(sizes, variance=1.0):
    """Of z <- (1 - l/2) z + sqrt(l) noise, the update for N(0, 1), after each of the steps."""
    for size in sizes:
        variance = (1 - size / 2) ** 2 * variance + size
    return variance


@pytest.mark.parametrize("step_size", [0.1, 0.5])
def test_tilted_gaussian(step_size, rng):
    """The stationary law of the unadjusted update for N(a, 1) is N(a, 1 / (1 - lambda / 4))."""
    a, n = 0.7, 40_000
    found = langevin(tilted(a), start(n, rng), steps=120, step_size=step_size, generator=rng)
    variance = 1 / (1 - step_size / 4)
    # After 120 steps 0.95^120 a = 0.0015 is left of the start's mean, at most. 4 standard errors.
    left = (1 - step_size / 2) ** 120 * a
    assert abs(found.samples.mean() - a) < 4 * math.sqrt(variance / n) + left
    assert abs(found.samples.var() - variance) < 4 * variance * math.sqrt(2 / n) + left**2


def test_annealing_lowers_the_bias(rng):
    n, steps, first, last = 40_000, 150, 0.8, 0.01
    options = {"steps": steps, "step_size": first, "final_step_size": last, "generator": rng}
    variance = float(langevin(tilted(), start(n, rng), **options).samples.var())
    sizes = [first * (last / first) ** (t / (steps - 1)) for t in range(steps)]
    expected = exact_variance(sizes)
    assert abs(variance - expected) < 4 * expected * math.sqrt(2 / n)
    assert expected - 1 < 0.5 * (1 / (1 - first / 4) - 1)  # the bias of a constant step size


def test_first_and_last_step_size():
    """Two steps without noise to speak of: the sizes are the first and the last."""
    z = torch.full((1, 1), 1000.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    options = {"step_size": 0.4, "final_step_size": 0.1, "generator": generator}
    found = langevin(tilted(), z, steps=2, **options).samples
    assert float(found) == pytest.approx(1000 * 0.8 * 0.95, abs=5)


def test_scale_is_the_standardised_coordinate():
    """Moving N(0, diag(s^2)) with scale s is moving N(0, I) and multiplying by s."""
    s = torch.tensor([0.01, 1.0, 50.0], dtype=torch.float64)
    z = start(4, torch.Generator().manual_seed(1), 3)
    options = {"steps": 40, "step_size": 0.3}
    plain = langevin(tilted(), z, **options, generator=torch.Generator().manual_seed(2))
    scaled = langevin(
        lambda x: tilted()(x / s),
        s * z,
        **options,
        scale=s,
        generator=torch.Generator().manual_seed(2),
    )
    torch.testing.assert_close(scaled.samples, s * plain.samples)


@pytest.mark.parametrize("steps", [1, 15, 16, 17, 40])
def test_a_draw_depends_on_its_generator_alone(steps):
    def run(numbers):
        z = torch.cat([start(1, torch.Generator().manual_seed(i), 2) for i in numbers])
        generators = [torch.Generator().manual_seed(100 + i) for i in numbers]
        return langevin(tilted(1.0), z, steps=steps, step_size=0.2, generator=generators).samples

    torch.testing.assert_close(run([0, 1, 2, 3])[2:], run([2, 3]), rtol=0, atol=0)


def test_log_density_along_the_way(rng):
    z = start(3, rng, 2)
    found = langevin(tilted(), z, steps=5, step_size=0.1, generator=rng)
    assert found.log_density.shape == (6, 3)
    torch.testing.assert_close(found.log_density[0], tilted()(z))
    torch.testing.assert_close(found.log_density[-1], tilted()(found.samples))
    assert not z.requires_grad and not found.samples.requires_grad


@torch.no_grad()
def test_works_where_gradients_are_off(rng):
    found = langevin(tilted(), start(2, rng), steps=3, step_size=0.1, generator=rng)
    assert found.samples.isfinite().all() and not torch.is_grad_enabled()


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"step_size": 0.0}, {"step_size": math.nan}, {"final_step_size": -1.0}]
)
def test_steps_and_sizes_must_be_positive(wrong, rng):
    options = {"steps": 3, "step_size": 0.1, "generator": rng} | wrong
    with pytest.raises(ValueError, match="must be positive"):
        langevin(tilted(), start(2, rng), **options)


def test_number_of_generators(rng):
    with pytest.raises(ValueError, match=r"one or 3 \(one a draw\), got 1"):
        langevin(tilted(), start(3, rng), steps=1, step_size=0.1, generator=[rng])


@pytest.mark.parametrize(
    "density",
    [lambda z: z.sum(-1) * math.nan, lambda z: -(z.square().sum(-1) ** 3)],
    ids=["NaN", "explodes"],
)
def test_not_finite_stops(density, rng):
    with pytest.raises(ValueError, match="not finite at step"):
        langevin(density, 10 * start(4, rng), steps=50, step_size=1.0, generator=rng)
