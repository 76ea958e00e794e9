import math

import pytest
import torch
from scipy import stats
from torch import distributions as d

from ncprior.vaes import Bernoulli, Categorical, Gaussian

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
