"""What `tests/test_walk.py` leaves: exact evidence is checked there for exact posteriors."""

import math

import pytest
import torch
from torch.distributions import Normal
from toys import ExactFlat, TwoGroups, standard_normal

from ncprior import NoiseContrastivePrior
from ncprior.metrics import base_log_ratios, importance_weighted_bounds
from ncprior.normal import Normal as DiagonalNormal
from ncprior.numerics import log_mean_exp, log_z
from ncprior.vaes.likelihoods import BernoulliEmission


class Tilt(torch.nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


@pytest.fixture
def images(rng):
    return torch.rand(3, 1, 1, 2, generator=rng, dtype=torch.float64)


def test_tilted_prior_against_its_closed_form(images, rng):
    """log r = a z puts the prior at N(a, I): p(x) = N(x; 0.5 + c a, c^2 + sigma^2) and Z is known.

    The bound from S samples of the posterior is off by O(1/S), about Var(w) / (2 S).
    """
    a, samples, vae = 0.4, 40_000, ExactFlat(2)
    prior = NoiseContrastivePrior([Tilt(a)], standard_normal(2))
    found = importance_weighted_bounds(vae, images, samples, prior=prior, generator=rng)
    c, log_z = vae.decoder.c.item(), 2 * a**2 / 2
    marginal = torch.distributions.Normal(0.5 + c * a, vae.spread)
    expected = marginal.log_prob(images).flatten(1).sum(1)
    # Weights are exp(a z): log-normal of variance 2 a^2 v under the posterior's variance v.
    spread = 2 * a**2 / (1 + (c / 0.1) ** 2)
    error = 4 * math.sqrt(math.expm1(spread) / samples)
    assert ((found.unnormalized_ncp - log_z - expected).abs() < error).all()
    torch.testing.assert_close(found.base, vae.log_evidence(images))


def test_a_constant_ratio_moves_the_bound_by_itself(images, rng):
    class Constant(torch.nn.Module):
        def forward(self, z, context=None):
            return torch.full((len(z),), 1.5, dtype=z.dtype)

    vae = TwoGroups(2, widen=1.4)
    prior = NoiseContrastivePrior([Constant(), Constant()])
    found = importance_weighted_bounds(vae, images, 5, prior=prior, generator=rng)
    torch.testing.assert_close(found.unnormalized_ncp, found.base + 3.0)


def test_bound_rises_to_the_evidence(images, rng):
    """With a posterior twice too wide: below log p(x), and nearer to it with more samples."""
    vae, copies = TwoGroups(2, widen=2.0), 4000
    many = images[:1].expand(copies, -1, -1, -1)
    exact = float(vae.log_evidence(images[:1]))
    gaps = []
    for samples in (1, 8, 64):
        bound = importance_weighted_bounds(vae, many, samples, generator=rng).base
        gaps.append((exact - float(bound.mean()), 4 * float(bound.std()) / math.sqrt(copies)))
    kl = 2 * (0.5 * (4 - 1) - math.log(2))  # one sample: the ELBO
    assert abs(gaps[0][0] - kl) < gaps[0][1]
    assert gaps[0][0] - gaps[0][1] > gaps[1][0] + gaps[1][1]
    assert gaps[1][0] - gaps[1][1] > gaps[2][0] + gaps[2][1]
    assert gaps[2][0] > -gaps[2][1]


@pytest.mark.parametrize("samples", [0, -1])
def test_samples_must_be_positive(samples, images, rng):
    with pytest.raises(ValueError, match="samples must be at least 1"):
        importance_weighted_bounds(ExactFlat(2), images, samples, generator=rng)


def snis_pair_evidence(images, a, vae):
    """log p(x) under the density that SNIS samples with K = 2, for one latent; on a grid.

    p_2(z) = p(z) r(z) E[2 / (r(z) + r(z'))], z' of the base.
    """
    line = torch.linspace(-9, 9, 1201, dtype=torch.float64)
    step = float(line[1] - line[0])
    p = Normal(0.0, 1.0).log_prob(line).exp() * step
    r = (a * line).exp()
    density = p * r * (2 / (r[:, None] + r) * p).sum(1)
    assert float(density.sum()) == pytest.approx(1, abs=1e-9)
    mean = 0.5 + vae.decoder.c.detach() * line
    likelihood = Normal(mean, 0.1).log_prob(images.flatten(1)).exp()  # (n, grid)
    return (likelihood * density).sum(1).log()


def snis_bounds(vae, images, a, proposals, samples, repeats, rng):
    """The bound for many pools of their own, (repeats, n)."""
    prior = NoiseContrastivePrior([Tilt(a)], standard_normal(1))
    found = []
    for _ in range(repeats):
        pool = base_log_ratios(vae, prior, proposals - 1, generator=rng)
        found.append(
            importance_weighted_bounds(
                vae, images, samples, prior=prior, pool=pool, generator=rng
            ).snis
        )
    return torch.stack(found)


def test_snis_is_unbiased_and_its_logarithm_a_bound(rng):
    """Its exponential averages to p(x) under p_K exactly, so that it is below on average."""
    a, vae = 1.5, ExactFlat(1)
    images = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).view(3, 1, 1, 1)
    exact = snis_pair_evidence(images, a, vae)
    found = snis_bounds(vae, images, a, 2, 5, 500, rng)
    ratio = (found - exact).exp()
    error = ratio.std(0) / math.sqrt(500)
    assert ((ratio.mean(0) - 1).abs() < 4 * error).all()
    gap = exact - found.mean(0)
    error = 4 * found.std(0) / math.sqrt(500)
    assert (gap > -error).all() and (gap > error)[:2].all()  # the third's is small


def test_snis_tightens_with_proposals(rng):
    """The gap that the pool leaves, log E[p] - E[log p], shrinks about as 1 / K."""
    vae = ExactFlat(1)
    images = torch.full((1, 1, 1, 1), 0.7, dtype=torch.float64)
    gaps = []
    for proposals in (8, 128):
        found = snis_bounds(vae, images, 1.0, proposals, 20, 150, rng)
        gaps.append(float(log_mean_exp(found, 0) - found.mean(0)))
    # Half a variance of 150 values each: good to 12 %, and their ratio is about 10.
    assert gaps[0] > 5 * gaps[1] > 0


@pytest.mark.parametrize("model", [ExactFlat(2), TwoGroups(2)], ids=["flat", "two groups"])
def test_snis_with_many_proposals_is_the_ncp(model, images, rng):
    """Proposals of a hierarchical VAE are whole walks of the base."""
    prior = NoiseContrastivePrior([Tilt(0.4)] * model.num_groups)
    pool = base_log_ratios(model, prior, 40_000, generator=rng)
    found = importance_weighted_bounds(model, images, 50, prior=prior, pool=pool, generator=rng)
    z = log_z(pool)
    expected = found.unnormalized_ncp - z.value
    torch.testing.assert_close(found.snis, expected, rtol=0, atol=2e-3)  # one draw of 40,001 more
    exact = model.num_groups * 2 * 0.4**2 / 2
    assert abs(z.value - exact) < 4 * z.se


def test_priors_are_scored_on_the_same_draws(images):
    """N(a, I) as a density, as a tilt of N(0, I) less its log Z, and as the VAE's own prior."""
    a, vae = 0.6, ExactFlat(2)
    shifted = DiagonalNormal(
        torch.full((2,), a, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    )
    prior = NoiseContrastivePrior([Tilt(a)], standard_normal(2))
    found, own = (
        importance_weighted_bounds(
            model,
            images,
            30,
            prior=with_ratio,
            others={"shifted": shifted.log_prob},
            generator=torch.Generator().manual_seed(3),
            rows_at_once=20,
        )
        for model, with_ratio in ((vae, prior), (vae.with_prior(shifted), None))
    )
    torch.testing.assert_close(found.others["shifted"], found.unnormalized_ncp - a**2)
    torch.testing.assert_close(own.base, found.others["shifted"])
    assert set(found.weights) == {"base", "shifted", "ncp"} and own.unnormalized_ncp is None
    assert found.snis is None and not found.base.requires_grad


@pytest.mark.parametrize("grey", [False, True])
def test_copies_of_binary_images(grey, rng):
    logits = 3 * torch.randn(12, 1, 4, 5, generator=rng, dtype=torch.float64)
    images = torch.rand(3, 1, 4, 5, generator=rng, dtype=torch.float64)
    images = images if grey else images.round()
    emission = BernoulliEmission(logits)
    expected = emission.log_prob(images.repeat(4, 1, 1, 1)).view(4, 3)
    torch.testing.assert_close(emission.log_prob_of_copies(images), expected)


@pytest.mark.parametrize("side", [1, 3, 7, 16])
def test_copies_of_images_of_any_size(side, rng):
    """Odd widths end the products early; the largest logits leave them neither 0 nor infinite."""
    logits = 500 * torch.randn(8, 2, side, side, generator=rng)
    logits[0] = 0
    images = (torch.rand(2, 2, side, side, generator=rng) < 0.5).float()
    found = BernoulliEmission(logits).log_prob_of_copies(images)
    expected = BernoulliEmission(logits.double()).log_prob(images.double().repeat(4, 1, 1, 1))
    torch.testing.assert_close(found.double(), expected.view(4, 2), rtol=1e-5, atol=1e-4)


def test_single_precision_loses_little(rng):
    """At the largest logits that an MNIST decoder gives: sums of 784 terms of up to 20."""
    logits = (10 * torch.randn(50, 1, 28, 28, generator=rng)).clamp(-20, 20)
    images = (torch.rand(5, 1, 28, 28, generator=rng) < 0.2).float()
    found = BernoulliEmission(logits).log_prob_of_copies(images)
    exact = BernoulliEmission(logits.double()).log_prob_of_copies(images.double())
    assert float((found - exact).abs().max()) < 5e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": torch.zeros(3)}, "needs the prior"),
        ({"others": {"ncp": Normal}}, "must not be named ncp"),
    ],
)
def test_arguments(options, message, images, rng):
    with pytest.raises(ValueError, match=message):
        importance_weighted_bounds(ExactFlat(2), images, 2, generator=rng, **options)


def test_others_need_one_group(images, rng):
    with pytest.raises(ValueError, match="priors of one latent group, this VAE has 2"):
        others = {"shifted": standard_normal(2).log_prob}
        importance_weighted_bounds(TwoGroups(2), images, 2, others=others, generator=rng)


def test_ratios_that_are_not_finite(images, rng):
    prior = NoiseContrastivePrior([Tilt(math.nan)], standard_normal(2))
    with pytest.raises(ValueError, match="an importance weight is NaN"):
        importance_weighted_bounds(ExactFlat(2), images, 2, prior=prior, generator=rng)
