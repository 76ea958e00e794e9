import math

import pytest
import torch
from scipy import stats
from torch import distributions as d

from ncprior.vaes import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    Gaussian,
    PixelNormal,
)
from ncprior.vaes.likelihoods import quantised

SHAPE = (3, 2, 4, 5)


@pytest.fixture
def outputs(rng):
    return torch.randn(SHAPE, generator=rng, dtype=torch.float64)


def test_bernoulli(outputs, rng):
    emission = Bernoulli()(outputs)
    torchs = d.Independent(d.Bernoulli(logits=outputs), 3)
    x = (torch.rand(SHAPE, generator=rng) < 0.5).double()
    torch.testing.assert_close(emission.log_prob(x), torchs.log_prob(x))
    torch.testing.assert_close(emission.mean, torchs.mean)
    assert emission.sample(generator=rng).unique().tolist() == [0, 1]


def test_bernoulli_of_many_rows_and_one_image(outputs):
    x = torch.ones(1, *SHAPE[1:], dtype=torch.float64)
    emission = Bernoulli()(outputs)
    torch.testing.assert_close(emission.log_prob(x), emission.log_prob(x.expand(SHAPE)))


@pytest.mark.parametrize("learned", [False, True])
def test_gaussian(learned, outputs, rng):
    likelihood = Gaussian(0.3, learned=learned).double()
    emission = likelihood(outputs)
    scale = likelihood.log_scale.exp().item()  # 0.3 in single precision
    assert scale == pytest.approx(0.3, rel=1e-6)
    torchs = d.Independent(d.Normal(outputs, scale), 3)
    x = torch.rand(SHAPE, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(emission.log_prob(x).detach(), torchs.log_prob(x))
    torch.testing.assert_close(emission.mean, outputs)
    assert [p.requires_grad for p in likelihood.parameters()] == [True] * learned
    assert "log_scale" in likelihood.state_dict()


def test_learned_scale_finds_the_spread_of_the_residuals(rng):
    """d log p / d log scale vanishes where scale^2 is the mean square."""
    likelihood = Gaussian(0.5, learned=True).double()
    x = torch.rand(40, 1, 3, 3, generator=rng, dtype=torch.float64)
    likelihood.log_scale.data = 0.5 * x.square().mean().log()
    likelihood(torch.zeros_like(x)).log_prob(x).sum().backward()
    assert abs(likelihood.log_scale.grad) < 1e-9 * x.numel()


def test_categorical(rng):
    levels, x = 5, torch.randint(5, SHAPE, generator=rng)
    outputs = torch.randn(3, levels * 2, 4, 5, generator=rng, dtype=torch.float64)
    emission = Categorical(levels)(outputs)
    by_pixel = d.Categorical(logits=outputs.view(3, levels, 2, 4, 5).movedim(1, -1))
    expected = by_pixel.log_prob(x).flatten(1).sum(1)
    values = torch.linspace(0, 1, levels, dtype=torch.float64)
    torch.testing.assert_close(emission.log_prob(values[x]), expected)
    nearby = (values[x] + 0.1 * (torch.rand(SHAPE, generator=rng) - 0.5)).clamp(0, 1)
    torch.testing.assert_close(emission.log_prob(nearby), expected)
    torch.testing.assert_close(emission.mean, by_pixel.probs @ values)


def test_categorical_probabilities_sum_to_one(rng):
    levels = 4
    emission = Categorical(levels)(torch.randn(levels, levels, 1, 1, generator=rng)[:1].double())
    x = torch.linspace(0, 1, levels, dtype=torch.float64).view(levels, 1, 1, 1)
    each = [emission.log_prob(value[None]).exp() for value in x]
    assert float(sum(each)) == pytest.approx(1)


def test_categorical_sample_law(rng):
    n, levels = 20_000, 4
    logits = torch.tensor([0.0, 1.0, -2.0, 0.5], dtype=torch.float64)
    emission = Categorical(levels)(logits.view(1, 4, 1, 1).expand(n, -1, 1, 1))
    x = emission.sample(generator=rng)
    assert x.shape == (n, 1, 1, 1)
    counts = torch.bincount((x.flatten() * 3).round().long(), minlength=4)
    assert stats.chisquare(counts, n * logits.softmax(0)).pvalue > 1e-4


@pytest.mark.parametrize(
    ("emission", "variance"),
    [
        (Bernoulli()(torch.zeros(20_000, 1, 1, 1).double()), 0.25),
        (Gaussian(0.2).double()(torch.full((20_000, 1, 1, 1), 0.5).double()), 0.04),
    ],
    ids=["bernoulli", "gaussian"],
)
def test_sample_moments(emission, variance, rng):
    """4 standard errors; (1 + kurtosis) / n bounds the error of a variance, here by 2 / n."""
    x = emission.sample(generator=rng)
    assert abs(x.mean() - 0.5) < 4 * math.sqrt(variance / len(x))
    assert abs(x.var() - variance) < 4 * variance * math.sqrt(2 / len(x))


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan])
def test_scale_must_be_positive(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        Gaussian(scale)


def test_levels_must_be_two():
    with pytest.raises(ValueError, match="levels must be at least 2, got 1"):
        Categorical(1)


def test_pixel_normal(rng):
    outputs = 4 * torch.randn(2, 6, 3, 4, generator=rng, dtype=torch.float64)
    emission = PixelNormal()(outputs)
    loc, raw = (5 * (part / 5).tanh() for part in outputs.chunk(2, 1))
    torchs = d.Independent(d.Normal(loc, raw.exp() + 0.01), 3)
    x = torch.rand(2, 3, 3, 4, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(emission.log_prob(x), torchs.log_prob(2 * x - 1))
    torch.testing.assert_close(emission.mean, (loc / 2 + 0.5).clamp(0, 1))
    drawn = emission.sample(generator=rng, temperature=0.5)
    assert drawn.min() >= 0 and drawn.max() <= 1
    still = emission.sample(generator=rng, temperature=1e-9)
    torch.testing.assert_close(still, emission.mean, rtol=0, atol=1e-6)


def mixture(rng, n, num_mixtures=2, num_bits=8, scale=1.0):
    outputs = torch.randn(n, 10 * num_mixtures, 1, 1, generator=rng, dtype=torch.float64)
    return DiscretizedLogisticMixture(num_mixtures, num_bits)(scale * outputs)


@pytest.mark.parametrize("num_bits", [2, 3])
def test_logistic_mixture_sums_to_one(num_bits, rng):
    """Over all colours of a pixel; wide enough that no bin is below 1e-5."""
    levels = 2**num_bits
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    x = torch.cartesian_prod(values, values, values)[:, :, None, None]
    emission = mixture(rng, 1, num_bits=num_bits)
    each = [emission.log_prob(pixel[None]).exp() for pixel in x]
    assert float(sum(each)) == pytest.approx(1)


def test_two_brightest_of_eight_bits_are_open_above():
    """Red given alone: all others certain. 254 holds 255 as well, and only 0 is open below."""
    outputs = torch.zeros(1, 10, 1, 1, dtype=torch.float64)
    emission = DiscretizedLogisticMixture(1)(outputs)
    logistic = lambda v: torch.tensor(v, dtype=torch.float64).sigmoid()

    def prob(red):
        x = torch.tensor([red / 255, 0.0, 0.0], dtype=torch.float64).view(1, 3, 1, 1)
        return float(emission.log_prob(x).exp() / logistic(-1 + 1 / 255) ** 2)

    assert prob(255) == pytest.approx(float(1 - logistic(1 - 1 / 255)))
    assert prob(254) == pytest.approx(float(1 - logistic(1 - 3 / 255)))
    assert prob(253) == pytest.approx(float(logistic(1 - 3 / 255) - logistic(1 - 5 / 255)))
    assert prob(1) == pytest.approx(float(logistic(-1 + 3 / 255) - logistic(-1 + 1 / 255)))


def test_narrow_logistic_has_finite_gradients():
    """Far from every mean, where the difference of two sigmoids is zero in any precision."""
    outputs = torch.zeros(1, 100, 2, 2)
    outputs[:, 20:] = -7
    outputs.requires_grad_()
    log_prob = DiscretizedLogisticMixture()(outputs).log_prob(torch.rand(1, 3, 2, 2))
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and outputs.grad.isfinite().all() and outputs.grad.any()


def test_logistic_mixture_sample_law(rng):
    """Bins of drawn reds, against their probabilities with the other colours summed out."""
    n = 20_000
    one = mixture(rng, 1, num_bits=2, scale=0.5)
    weights, means, scales = one.weights[0, :, 0, 0], one.means[0, 0], one.log_scales[0, 0].exp()
    edges = torch.tensor([-2 / 3, 0, 2 / 3], dtype=torch.float64)
    cdf = ((edges - means[:, 0]) / scales[:, 0]).sigmoid() * weights.softmax(0)[:, None]
    probs = torch.cat([torch.zeros(1), cdf.sum(0), torch.ones(1)]).diff()
    many = type(one)(*(t.expand(n, *t.shape[1:]) for t in list(vars(one).values())[:4]), 2)
    x = many.sample(generator=rng)
    assert x.shape == (n, 3, 1, 1) and x.min() >= 0 and x.max() <= 1
    counts = torch.bincount(torch.bucketize(2 * x[:, 0].flatten() - 1, edges), minlength=4)
    assert stats.chisquare(counts, n * probs).pvalue > 1e-4


@pytest.mark.parametrize("num_bits", [1, 3, 5, 7])
def test_quantised(num_bits):
    """The low bits of 8-bit values are cut; doing it twice changes nothing, in any precision."""
    eight = torch.arange(256)
    levels = eight // 2 ** (8 - num_bits)
    for dtype in (torch.float32, torch.float64):
        once = quantised(eight.to(dtype) / 255, num_bits)
        torch.testing.assert_close(once, levels.to(dtype) / (2**num_bits - 1), rtol=0, atol=0)
        torch.testing.assert_close(quantised(once, num_bits), once, rtol=0, atol=0)
        assert torch.equal(quantised(once, 8), once)
        rounded = (eight.to(dtype) * (1 / 255)).nextafter(torch.zeros(256, dtype=dtype))
        torch.testing.assert_close(quantised(rounded, num_bits), once, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"), [((0, 8), "num_mixtures must"), ((2, 9), "num_bits must be between")]
)
def test_logistic_mixture_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiscretizedLogisticMixture(*arguments)
