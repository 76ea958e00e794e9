import math

import pytest
import torch
from torch.distributions import Normal

from ncprior.samplers import annealed


def normal(_, k, generator, size=2):
    return torch.randn(k, size, generator=generator, dtype=torch.float64)


def log_normal(z, mean=0.0, spread=1.0):
    return Normal(mean, spread).log_prob(z).sum(-1)


def base(z, _):
    return log_normal(z)


def between(new, old=(0.0, 1.0)):
    """log N(z; new) - log N(z; old), a stage."""
    return lambda z, _: log_normal(z, *new) - log_normal(z, *old)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("mean", "spread", "stages"),
    [
        (6.0, 0.1, [between((6.0, 0.1))]),
        (6.0, 0.1, [between((3.0, 0.5)), between((6.0, 0.1), (3.0, 0.5))]),
        (0.0, 3.0, [between((0.0, 3.0))]),
    ],
)
def test_gaussian_where_the_base_has_no_draws(mean, spread, stages):
    """In the first case the nearest of 10^6 proposals of the base is 30 spreads away."""
    n = 200
    found = annealed(normal, base, stages, n, 32, generator=seeded())

    # 2 n independent coordinates; 4 standard errors. Every particle has moved by itself through
    # the last temperatures, in which the bias of order 1 / particles of the first is forgotten.
    z = (found.samples - mean) / spread
    assert abs(z.mean()) < 4 / math.sqrt(2 * n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / (2 * n))
    assert found.stage_ess.shape == (len(stages), n)
    assert (found.ess >= 0.49 * 32).all()  # as asked for
    assert (found.levels >= len(stages)).all()
    assert 0.4 < found.acceptance.mean() < 0.9


def test_two_narrow_modes():
    """Both are reached, equally often: the target is symmetric and so is its sampler."""
    n, centre, spread = 300, torch.tensor([5.0, 0.0], dtype=torch.float64), 0.1

    def log_ratio(z, _):
        modes = torch.stack([log_normal(z, m, spread) for m in (-centre, centre)])
        return modes.logsumexp(0) - math.log(2) - log_normal(z)

    z = annealed(normal, base, [log_ratio], n, 32, generator=seeded()).samples
    right = z[:, 0] > 0
    assert abs(right.double().mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    at = (z - torch.where(right[:, None], centre, -centre)) / spread
    assert abs(at.mean()) < 4 / math.sqrt(2 * n)
    assert abs(at.var() - 1) < 4 * math.sqrt(2 / (2 * n))


def test_weights_of_modes():
    """Modes of weight 1/5 and 4/5 that no move connects."""
    n, m, share = 500, 200, 0.8

    def log_ratio(z, _):
        modes = [log_normal(z[..., :1], x, 0.25) for x in (-2.0, 2.0)]
        weighed = torch.stack(modes) + torch.tensor([1 - share, share]).log()[:, None, None]
        return weighed.logsumexp(0) - log_normal(z[..., :1])

    found = annealed(normal, base, [log_ratio], n, m, generator=seeded(), moves=1)
    right = (found.samples[:, 0] > 0).double().mean()
    # 4 standard errors, and the bias of a self-normalised mean: a pool's estimates of Z and of the
    # share of a mode hang together, by at most their spreads' product. With u = Z's estimate,
    # E[right / u] - share is about -cov(right, u) + share var(u), both below var(u) here.
    bias = float(found.log_z.exp().var())
    assert abs(right - share) < 4 * math.sqrt(share * (1 - share) / n) + bias
    error = float(found.log_z.exp().std()) / math.sqrt(n)
    assert abs(found.log_z.exp().mean() - 1) < 4 * error + bias
    assert bias < 0.05


def test_moves_leave_the_law_as_it_is():
    """Without a ratio the particles stay N(0, 1), however large the steps: each is corrected."""
    n = 400
    found = annealed(normal, base, [lambda z, _: 0 * z.sum(-1)], n, 2, generator=seeded(), moves=40)
    assert abs(found.samples.mean()) < 4 / math.sqrt(2 * n)
    assert abs(found.samples.var() - 1) < 4 * math.sqrt(2 / (2 * n))
    assert torch.equal(found.levels, torch.ones(n, dtype=torch.float64))
    torch.testing.assert_close(found.log_z, torch.zeros(n, dtype=torch.float64))
    assert found.acceptance.mean() < 0.95  # so that there is something to correct


def test_constants_move_log_z_alone():
    plain = annealed(normal, base, [between((1.0, 0.5))], 20, 16, generator=seeded())
    shifted = annealed(
        normal, base, [lambda z, s: between((1.0, 0.5))(z, s) + 3], 20, 16, generator=seeded()
    )
    torch.testing.assert_close(shifted.samples, plain.samples)
    torch.testing.assert_close(shifted.log_z, plain.log_z + 3)


def test_a_pool_at_rest_uses_up_no_numbers():
    """Draws that need different numbers of temperatures, together and one by one."""
    spreads = torch.tensor([0.9, 0.01, 0.3], dtype=torch.float64)

    def log_ratio(z, draws):
        return log_normal(z, 0.0, spreads[draws, None, None]) - log_normal(z)

    generators = [seeded(i) for i in range(3)]
    whole = annealed(normal, base, [log_ratio], 3, 16, generator=generators, chunk=1000)
    generators = [seeded(i) for i in range(3)]
    single = annealed(normal, base, [log_ratio], 3, 16, generator=generators, chunk=1)
    assert len(whole.levels.unique()) == 3
    for a, b in zip(whole, single, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "change", [{"n": 0}, {"particles": 1}, {"moves": 0}, {"ess_share": 1.0}, {"log_ratios": []}]
)
def test_rejects_arguments_out_of_range(change):
    options = {"log_ratios": [between((0.0, 1.0))], "n": 2, "particles": 4, "moves": 1} | change
    with pytest.raises(ValueError, match="must be at least 1"):
        annealed(normal, base, options.pop("log_ratios"), options.pop("n"),
                 options.pop("particles"), generator=seeded(), **options)  # fmt: skip


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rejects_unusable_ratios(bad):
    with pytest.raises(ValueError, match="not usable"):
        annealed(normal, base, [lambda z, _: z.sum(-1) * 0 + bad], 2, 4, generator=seeded())


def test_rejects_wrong_shapes_and_numbers_of_generators():
    with pytest.raises(ValueError, match="must have shape"):
        annealed(normal, base, [lambda z, _: z.sum(-1)[0]], 2, 4, generator=seeded())
    with pytest.raises(ValueError, match="one or 2"):
        annealed(normal, base, [between((0.0, 1.0))], 2, 4, generator=[seeded()])
