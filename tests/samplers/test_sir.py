import importlib
import itertools
import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ncprior.numerics import effective_sample_size, log_mean_exp
from ncprior.samplers import sir
from ncprior.samplers.sir import enough_proposals

module = importlib.import_module("ncprior.samplers.sir")  # its name is also the function's


def normal(_, k, generator):
    return torch.randn(k, 1, generator=generator, dtype=torch.float64)


def tilt(a):
    return lambda z, draws: a * z[..., 0]


def seeded(count, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def test_tilted_gaussian(rng):
    """p = N(0, 1) and log r = a z give N(a, 1). With r^0.9 the mean is off by 0.1."""
    a, n, m = 1.0, 8000, 512
    found = sir(normal, tilt(a), n, m, generator=rng)
    assert found.samples.shape == (n, 1) and found.ess.shape == found.log_z.shape == (n,)
    # 4 standard errors, and the leading 1/m bias: for both moments at most a exp(a^2) / m.
    bias = a * math.exp(a**2) / m
    assert abs(found.samples.mean() - a) < 4 / math.sqrt(n) + bias
    assert abs(found.samples.var() - 1) < 4 * math.sqrt(2 / n) + bias


def test_pool_figures_of_a_tilted_gaussian(rng):
    """Z = exp(a^2 / 2) and ESS / m tends to exp(-a^2)."""
    a, n, m = 0.5, 2000, 512
    found = sir(normal, tilt(a), n, m, generator=rng)
    # With A = mean(w) / E w and B = mean(w^2) / E w^2, ESS / m = exp(-a^2) A^2 / B. To second order
    # its relative bias is Var(A - B) and its relative variance Var(2 A - B). Log-normal weights
    # have m Var A = v1, m Var B = v2 and m Cov(A, B) = v12.
    v1, v2, v12 = (math.expm1(c * a**2) for c in (1, 4, 2))
    expected = math.exp(-(a**2)) * (1 + (v1 + v2 - 2 * v12) / m)
    error = 4 * math.sqrt((4 * v1 + v2 - 4 * v12) / m / n)
    assert float(found.ess.mean() / m / expected) == pytest.approx(1, abs=error + 10 / m**2)

    # E log mean(w) = log Z - v1 / (2 m) + O(m^-2).
    error = 4 * math.sqrt(v1 / m / n) + 10 / m**2
    assert abs(float(found.log_z.mean()) - (a**2 / 2 - v1 / (2 * m))) < error


def test_one_proposal_is_the_base():
    found = sir(normal, tilt(1.0), 8, 1, generator=seeded(8))
    expected = torch.cat([normal(0, 1, g) for g in seeded(8)])
    torch.testing.assert_close(found.samples, expected, rtol=0, atol=0)
    torch.testing.assert_close(found.ess, torch.ones(8, dtype=torch.float64))


def test_flat_ratio_keeps_the_whole_pool(rng):
    found = sir(normal, lambda z, _: 0 * z[..., 0], 3, 2000, generator=rng)
    torch.testing.assert_close(found.ess, torch.full((3,), 2000.0, dtype=torch.float64))
    torch.testing.assert_close(found.log_z, torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("shift", [-1e4, -30.0, 1000.0])
def test_shift_of_the_ratio_changes_only_log_z(shift):
    """A constant in log r cancels; without it exp would overflow."""
    plain, moved = (
        sir(normal, lambda z, _, c=c: z[..., 0] + c, 6, 1500, generator=seeded(6))
        for c in (0.0, shift)
    )
    torch.testing.assert_close(moved.samples, plain.samples, rtol=0, atol=0)
    torch.testing.assert_close(moved.ess, plain.ess, rtol=1e-8, atol=0)
    torch.testing.assert_close(moved.log_z - shift, plain.log_z, rtol=0, atol=1e-8)


@given(
    n=st.integers(1, 7),
    m=st.integers(1, 2600),
    chunk=st.integers(1, 9000),
    others=st.integers(0, 4),
)
def test_a_draw_depends_on_its_generator_alone(n, m, chunk, others):
    """Neither `chunk` nor the number of draws beside it matters."""
    alone = sir(normal, tilt(0.7), 1, m, generator=seeded(1, n - 1))
    found = sir(normal, tilt(0.7), n + others, m, generator=seeded(n + others), chunk=chunk)
    torch.testing.assert_close(found.samples[n - 1], alone.samples[0], rtol=0, atol=0)
    torch.testing.assert_close(found.ess[n - 1], alone.ess[0])
    torch.testing.assert_close(found.log_z[n - 1], alone.log_z[0])


@pytest.mark.parametrize("block", [1, 2, 3, 1024])
def test_law_by_enumeration(block, monkeypatch, rng):
    """Against the exact law of SIR from five points, in one block of proposals or in several."""
    monkeypatch.setattr(module, "BLOCK", block)
    n, m = 12_000, 4
    p = torch.tensor([0.1, 0.4, 0.2, 0.2, 0.1], dtype=torch.float64)
    r = torch.tensor([3.0, 0.2, 1.0, 0.01, 8.0], dtype=torch.float64)

    law = torch.zeros(5, dtype=torch.float64)
    for pool in map(torch.tensor, itertools.product(range(5), repeat=m)):
        law.index_add_(0, pool, p[pool].prod() * r[pool] / r[pool].sum())

    def propose(_, k, generator):
        return torch.multinomial(p, k, replacement=True, generator=generator).double()

    picks = sir(propose, lambda z, _: r[z.long()].log(), n, m, generator=rng).samples
    counts = torch.bincount(picks.long(), minlength=5)
    # One seed in 10,000 fails by chance.
    assert stats.chisquare(counts, n * law).pvalue > 1e-4


@pytest.mark.parametrize("rare", [0.2, 0.02, 0.005])
@pytest.mark.parametrize("nats", [0.1, 0.02])
def test_enough_proposals_by_the_exact_law(rare, nats):
    """Of two points, which a pool holds as a binomial says: within the nats, a sixteenth is not."""
    p = torch.tensor([rare, 1 - rare], dtype=torch.float64)
    r = torch.tensor([0.5 / rare, 0.5 / (1 - rare)], dtype=torch.float64)  # r p is (1/2, 1/2)

    def apart(m):
        j = torch.arange(m + 1, dtype=torch.float64)
        chance = torch.from_numpy(stats.binom.pmf(j, m, rare))
        first = float((chance * j * r[0] / (j * r[0] + (m - j) * r[1])).sum())
        return -0.5 * math.log(4 * first * (1 - first))

    share = 1 / float((p * r**2).sum())
    m = enough_proposals(share, nats)
    assert apart(m) <= math.log1p((1 / share - 1) / m)
    assert m == 1000 or apart(m) <= nats
    assert m in (16, 1000) or apart(m // 16) > nats


def test_enough_proposals():
    assert enough_proposals(1.0) == enough_proposals(1 + 1e-9) == 16
    assert enough_proposals(1e-9) == 1000
    for share in (0.5, 0.12, 0.0125):
        m = enough_proposals(share)
        assert math.log1p((1 / share - 1) / m) <= 0.1
        assert m == 16 or math.log1p((1 / share - 1) / (m / 2)) > 0.1
        assert enough_proposals(share, 0.05) >= m
    for wrong in ({"share": 0.0}, {"share": math.nan}, {"share": 1, "nats": 0}):
        with pytest.raises(ValueError, match="share and nats must be positive"):
            enough_proposals(**wrong)


@pytest.mark.parametrize("block", [1, 3, 16, 1024])
def test_pool_figures_against_one_block(block, monkeypatch, rng):
    """ESS and log Z, merged over blocks, are those of the whole pool; -inf has no weight."""
    monkeypatch.setattr(module, "BLOCK", block)
    n, m = 5, 37
    log_w = 5 * torch.randn(n, m, generator=rng, dtype=torch.float64)
    log_w[:, :20:3] = -torch.inf  # whole blocks of them when blocks are short
    log_w[0, :36] = -torch.inf
    streams = [iter(row) for row in log_w]

    def propose(i, k, _):
        return torch.stack([next(streams[i]) for _ in range(k)])

    found = sir(propose, lambda z, _: z, n, m, generator=rng)
    torch.testing.assert_close(found.ess, effective_sample_size(log_w))
    torch.testing.assert_close(found.log_z, log_mean_exp(log_w))
    assert found.samples[0] == log_w[0, 36] and found.samples.isfinite().all()


def test_agrees_with_a_naive_sampler(rng):
    """The same law as weighing the whole pool at once and drawing an index."""
    n, m = 3000, 60

    def log_r(z):
        return 2 * torch.sin(3 * z)

    z = torch.randn(n, m, generator=rng, dtype=torch.float64)
    picks = torch.multinomial(log_r(z).softmax(1), 1, generator=rng)
    naive = z.gather(1, picks).squeeze(1)
    found = sir(normal, lambda z, _: log_r(z[..., 0]), n, m, generator=rng).samples[:, 0]
    assert stats.ks_2samp(found, naive).pvalue > 1e-4


def test_memory_does_not_grow_with_proposals(rng):
    """Neither what is weighed at a time nor the proposals alive at any time."""

    def peak(m, chunk):
        widest, alive, most = [0], set(), [0]

        def propose(i, k, generator):
            z = normal(i, k, generator)
            alive.add(id(z))
            weakref.finalize(z, alive.discard, id(z))
            most[0] = max(most[0], len(alive))
            return z

        def log_ratio(z, _):
            widest[0] = max(widest[0], z[..., 0].numel())
            return z[..., 0]

        sir(propose, log_ratio, 6, m, generator=rng, chunk=chunk)
        return widest[0], most[0]

    assert peak(20 * module.BLOCK, 4096) == peak(3 * module.BLOCK, 4096)
    assert peak(3 * module.BLOCK, 4096)[0] <= 4096
    assert peak(3 * module.BLOCK, 100)[0] <= 100


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_unusable_ratio_stops(bad, rng):
    def log_ratio(z, _):
        values = z[..., 0].clone()
        values[0, 3] = bad
        return values

    with pytest.raises(ValueError, match=r"NaN or \+inf"):
        sir(normal, log_ratio, 2, 8, generator=rng)


def test_pool_without_weight_stops(rng):
    with pytest.raises(ValueError, match="only log-ratios of -inf"):
        sir(normal, lambda z, _: z[..., 0] * 0 - torch.inf, 2, 3000, generator=rng)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"m": 0}, {"chunk": 0}, {"block": 0}])
def test_counts_must_be_positive(wrong, rng):
    with pytest.raises(ValueError, match="n, m, chunk and block must be at least 1"):
        sir(normal, tilt(1), **({"n": 2, "m": 2, "generator": rng} | wrong))


def test_number_of_generators():
    with pytest.raises(ValueError, match=r"one or 3 \(one a draw\), got 2"):
        sir(normal, tilt(1), 3, 4, generator=seeded(2))


def test_shape_of_the_ratio(rng):
    with pytest.raises(ValueError, match=r"shape \(2, 4\), got \(2, 4, 1\)"):
        sir(normal, lambda z, _: z, 2, 4, generator=rng)


def test_no_gradient_flows(rng):
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    found = sir(normal, lambda z, _: weight * z[..., 0], 2, 4, generator=rng)
    assert not found.samples.requires_grad and not found.log_z.requires_grad
