"""Priors combined into one, against products of normal densities."""

import copy
import itertools
import math

import pytest
import torch
from torch.distributions import Normal as TorchNormal
from torch.distributions import kl_divergence
from toys import TwoGroups, gaussian_images, linear_vae, true_log_ratio

import ncprior
from ncprior.metrics.normalizer import METHODS, estimate_log_z
from ncprior.normal import StandardNormal
from ncprior.numerics import LogZ
from ncprior.priors import GaussianMixture, NoiseContrastivePrior
from ncprior.ratios import CombinedRatio, ReencodedRatio, ResidualRatio, UnitRatio
from ncprior.storage import fingerprint
from ncprior.training import combining
from ncprior.training.combining import best_shares, best_weights

MEAN, SPREAD = 0.8, 0.6
QUIET = {"progress": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    monkeypatch.setattr(combining, "DRAWS", 20_000)
    monkeypatch.setattr(combining, "LOG_Z_DRAWS", 20_000)


@pytest.fixture(scope="module")
def vae():
    return linear_vae(MEAN, SPREAD)


@pytest.fixture(scope="module")
def data():
    return gaussian_images(20_000, torch.Generator().manual_seed(2))


@pytest.fixture
def z():
    noise = torch.randn(200, 2, generator=torch.Generator().manual_seed(1))
    return MEAN + SPREAD * noise


class Scaled(torch.nn.Module):
    """A ratio that is off by a factor, which a normaliser takes out."""

    def __init__(self, log_factor):
        super().__init__()
        self.log_factor = log_factor

    def forward(self, z, context=None):
        return torch.full_like(z[:, 0], self.log_factor)


def normal(mean, spread):
    """N(mean, spread^2 I) as a density that can be kept."""
    found = GaussianMixture(1, 2)
    found.means.fill_(mean)
    found.cholesky.copy_(spread * torch.eye(2))
    found.precision.copy_(torch.eye(2) / spread)
    return found


def random_ratio(seed, size=2):
    torch.manual_seed(seed)
    return ResidualRatio(size, width=8, blocks=1).eval()


@pytest.mark.parametrize("w", [0.4, 0.5, 0.65])
def test_weights_that_make_q_of_its_neighbours(vae, data, z, w):
    """N(0, 1)^(1 - 2w) N(u - d, S^2)^w N(u + d, S^2)^w is N(m, s^2) normalised, for some u and S.

    Precisions add up, 1 - 2w + 2w / S^2 = 1 / s^2, and so do precisions times means.
    """
    wide = (2 * w / (SPREAD**-2 - 1 + 2 * w)) ** 0.5
    middle = MEAN * wide**2 / (2 * w * SPREAD**2)
    laws = [(middle - 0.2, wide), (middle + 0.2, wide)]
    parts = [normal(*law) for law in laws]
    prior = ncprior.combine(
        vae, parts, data, mean="geometric", seed=0, names=["low", "high"], **QUIET
    )
    record, q = prior.record, TorchNormal(MEAN, SPREAD)
    whole = 2 * kl_divergence(q, TorchNormal(0.0, 1.0))
    for part, name, law in zip(record["combined"], ["low", "high"], laws, strict=True):
        assert part["name"] == name and part["weight"] == pytest.approx(w, abs=0.04)
        won = float(whole - 2 * kl_divergence(q, TorchNormal(*law)))
        assert part["value"] == pytest.approx(won, abs=4 * part["se"] + 0.01)
    assert record["bound"]["value"] == pytest.approx(float(whole), abs=4 * record["bound"]["se"])
    assert record["gain"]["value"] > 5 * record["gain"]["se"]
    assert any(prior.base is part for part in parts)  # nearer to q than N(0, I)
    assert abs(prior.log_z.value) < 0.03
    assert prior.ratios[0].weights.sum() == pytest.approx(1)
    off = prior.log_prob(z) - TorchNormal(0.0, 1.0).log_prob(z).sum(-1) - true_log_ratio(z)
    assert off.square().mean().sqrt() < 0.05
    drawn = ncprior.draw(vae, prior, 4000, seed=0, proposals=64).latents[0]
    assert (drawn.mean(0) - MEAN).abs().max() < 0.04
    assert (drawn.std(0) - SPREAD).abs().max() < 0.04


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_one_that_is_right_gets_all_the_weight(vae, data, mean):
    wrong = normal(-0.5, 0.5)
    prior = ncprior.combine(vae, [wrong, normal(MEAN, SPREAD)], data, mean=mean, **QUIET)
    low, high = (part["weight"] for part in prior.record["combined"])
    assert low < 0.02 and high == pytest.approx(1, abs=0.04)
    assert abs(prior.record["gain"]["value"]) < 3 * prior.record["gain"]["se"] + 0.002


def test_an_arithmetic_mean_is_the_mixture(vae, data, z):
    """q is the mean of two normal laws: 0.3 and 0.7 of them, and nothing of a third."""
    laws = [(-0.6, 0.5), (0.9, 0.4), (3.0, 0.3)]
    parts = [normal(*law) for law in laws]
    generator = torch.Generator().manual_seed(4)
    chosen = torch.rand(40_000, generator=generator) < 0.3
    x = torch.randn(40_000, 2, generator=generator)
    at_q = torch.where(chosen[:, None], -0.6 + 0.5 * x, 0.9 + 0.4 * x)
    shares = best_shares(torch.stack([part.log_prob(at_q) for part in parts], -1).double())
    assert shares[2] == 0 and shares.sum() == pytest.approx(1)
    assert shares[0] == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 40_000) ** 0.5 + 0.002)

    # As a prior: its density is w_1 p_1 + w_2 p_2, an NCP's constant included.
    parts = [normal(0.7, 0.75), normal(1.0, 0.5)]  # the first is the base, and wide enough
    shifted = NoiseContrastivePrior([Scaled(3.0)], parts[1])
    prior = ncprior.combine(vae, [parts[0], shifted], data, mean="arithmetic", **QUIET)
    record, (ratio,) = prior.record, prior.ratios
    assert ratio.mean == "arithmetic" and record["settings"]["mean"] == "arithmetic"
    weights = [part["weight"] for part in record["combined"]]
    assert sum(weights) == pytest.approx(1)
    each = [w * part.log_prob(z).exp() for w, part in zip(weights, parts, strict=True)]
    want = sum(each).log()
    torch.testing.assert_close(prior.unnormalized_log_prob(z), want, atol=2e-3, rtol=2e-3)
    best = max(part["value"] for part in record["combined"])
    assert record["bound"]["value"] > best + record["gain"]["value"] / 2 > best
    assert abs(prior.log_z.value) < 4 * prior.log_z.se + 4e-3  # that of the second's own Z
    assert record["bound"]["value"] == pytest.approx(record["combined"][0]["value"], abs=0.2)


def test_one_without_weight_is_not_computed(vae, data, z):
    """Away from q, on the side where more of it only hurts: its weight is 0, the rest is kept."""
    far = normal(-3.0, 0.5)
    prior = ncprior.combine(vae, [far, normal(0.5, 0.7)], data, mean="geometric", **QUIET)
    ratio = prior.ratios[0]
    assert prior.record["combined"][0]["weight"] == 0
    assert len(ratio.ratios) == len(ratio.weights) == 2 and len(ratio.bases) == 1
    low, high = normal(0.5, 0.7).log_prob(z), vae.prior.log_prob(z)
    weight = prior.record["combined"][1]["weight"]
    off = prior.unnormalized_log_prob(z) - (weight * low + (1 - weight) * high)
    assert off.std() < 1e-4  # a constant


def test_one_that_is_a_density_alone_is_measured_like_any_other(vae, data):
    """Its log r is 0 wherever it is: there is no gradient to follow."""
    prior = ncprior.combine(vae, [normal(MEAN, SPREAD), normal(-4.0, 0.3)], data, **QUIET)
    assert prior.ratios[0].places == (0,)
    options = {"draws": 100, "chains": 20, "temperatures": 3, "seed": 0}
    found = estimate_log_z(prior.under(vae), prior, METHODS, **options)
    assert all(abs(z.value) < 1e-5 for z in found.values())


def test_a_known_log_z_is_not_estimated_from_draws_that_do_not_cover(vae, data):
    """An NCP as wide as N(0, I) beside a narrow mixture: as the density that it is, or told so."""
    wide, narrow = normal(0.0, 1.0), normal(0.95, 0.9 * 0.4)
    as_ratio = NoiseContrastivePrior([Scaled(2.0)], wide, log_z=LogZ(2.0, 0.0, 1.0, 1))
    records = [
        ncprior.combine(vae, [part, narrow], data, **QUIET).record["combined"]
        for part in (wide, as_ratio)
    ]
    for one, other in zip(*records, strict=True):
        assert one["weight"] == pytest.approx(other["weight"], abs=1e-4)
        assert one["value"] == pytest.approx(other["value"], abs=1e-4)


def test_best_weights_against_a_grid():
    generator = torch.Generator().manual_seed(3)
    at_base = torch.randn(5000, 3, generator=generator, dtype=torch.float64)
    mean = torch.tensor([0.5, -0.9, 0.2], dtype=torch.float64)  # the second is low, whatever w
    found, c = best_weights(mean, at_base)
    worth = lambda w: w @ mean - (at_base @ w).logsumexp(0) + math.log(5000)
    grid = [torch.tensor([*w, 1 - sum(w)], dtype=torch.float64) for w in
            itertools.product(torch.linspace(0, 2, 101).tolist(), repeat=2)]  # fmt: skip
    best = max(grid, key=worth)
    assert found.sum() == pytest.approx(1) and found[1] == 0 and abs(found[0] - best[0]) < 0.02
    assert float(worth(found)) >= float(worth(best)) - 1e-9
    assert c == pytest.approx(float(found @ mean - worth(found)), rel=1e-5)


def test_priors_on_other_bases(vae, data, z, monkeypatch):
    """Each part is log r_i + log b_i, whatever the base that was chosen."""
    weights = torch.tensor([0.3, 0.2, 0.1, 0.25, 0.15], dtype=torch.float64)
    monkeypatch.setattr(combining, "best_weights", lambda *_: (weights, 0.1))
    near, far = normal(MEAN, SPREAD), normal(0.3, 1.0)
    networks = [random_ratio(i) for i in range(3)]
    of_vae = fingerprint(vae)
    priors = [NoiseContrastivePrior([r], b) for r, b in
              zip(networks, [vae.prior, near, copy.deepcopy(near)], strict=True)]  # fmt: skip
    for prior in priors:
        prior.record |= {"vae": of_vae, "fitted_images": 10}
    found = ncprior.combine(vae, [*priors, far], data, mean="geometric", **QUIET)
    (ratio,) = found.ratios
    assert found.base is near and ratio.places == (1, 0, 0, 2, 1)  # the copy is not kept again
    own, of_near = vae.prior.log_prob(z), near.log_prob(z)
    log_b = [own, of_near, of_near, far.log_prob(z), own]
    log_r = [*(network(z) for network in networks), 0, 0]
    want = sum(w * (r + b - near.log_prob(z))
               for w, r, b in zip(ratio.weights, log_r, log_b, strict=True))  # fmt: skip
    torch.testing.assert_close(found.log_ratio(0, z), want - 0.1)
    point = z.clone().requires_grad_(True)
    (slope,) = torch.autograd.grad(found.log_ratio(0, point).sum(), point)
    nudged = (found.log_ratio(0, z + 1e-2) - found.log_ratio(0, z - 1e-2)) / 2e-2
    torch.testing.assert_close(slope.sum(1), nudged, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_kept_and_read_again(vae, data, z, tmp_path, mean):
    """A combination of a combination and of a ratio that looks at decoded latents."""
    reencoded = ReencodedRatio(random_ratio(0, 11), 2, vae).eval()
    first = NoiseContrastivePrior([reencoded], normal(MEAN, SPREAD))
    first.record = {"vae": fingerprint(vae), "fitted_images": 10}
    second = ncprior.combine(vae, [normal(0.5, 0.7), normal(0.9, 0.7)], data, **QUIET)
    prior = ncprior.combine(vae, [first, second], data, mean=mean, **QUIET)
    prior.save_pretrained(tmp_path)
    known = NoiseContrastivePrior.from_pretrained(tmp_path, vae=vae)
    torch.testing.assert_close(known.log_ratio(0, z), prior.log_ratio(0, z))
    torch.testing.assert_close(known.log_prob(z), prior.log_prob(z))
    assert known.record == prior.record
    apart = copy.deepcopy(prior)
    prior.base.means.add_(5)  # what the copy stands on is its own
    torch.testing.assert_close(apart.log_ratio(0, z), known.log_ratio(0, z))


def test_bfloat16_is_not_for_densities(vae, data):
    prior = ncprior.combine(vae, [normal(0.5, 0.7), normal(0.9, 0.7)], data, **QUIET)
    want = ncprior.draw(vae, prior, 50, seed=0, proposals=16).latents[0]
    found = ncprior.draw(vae, prior, 50, seed=0, proposals=16, bfloat16=True).latents[0]
    torch.testing.assert_close(found, want)


def test_bad_input(vae, data):
    one = normal(0.5, 0.7)
    with pytest.raises(ValueError, match="mean must be one of arithmetic, geometric, got 'harm"):
        ncprior.combine(vae, [one, one], data, mean="harmonic", **QUIET)
    with pytest.raises(ValueError, match="mean must be one of arithmetic, geometric, got 'harm"):
        CombinedRatio([UnitRatio()], [], [0], 2, one, "harmonic")
    with pytest.raises(ValueError, match="priors must hold at least two to combine, got 1"):
        ncprior.combine(vae, [one], data, **QUIET)
    with pytest.raises(ValueError, match="names must be 2, one for each prior, got 1"):
        ncprior.combine(vae, [one, one], data, names=["a"], **QUIET)
    with pytest.raises(ValueError, match=r"rows must name at least 2 images .* got 0"):
        ncprior.combine(vae, [one, one], data, rows=torch.tensor([], dtype=torch.long), **QUIET)
    with pytest.raises(ValueError, match="one latent group, this one has 2"):
        ncprior.combine(TwoGroups(), [one, one], data, **QUIET)
    other = NoiseContrastivePrior([UnitRatio()], one)
    other.record["vae"] = "another"
    with pytest.raises(ValueError, match=r"priors\[1\] was fitted on another VAE"):
        ncprior.combine(vae, [one, other], data, **QUIET)
    with pytest.raises(ValueError, match=r"priors\[1\] is the VAE's own; name priors"):
        ncprior.combine(vae, [one, StandardNormal(2)], data, **QUIET)
    bounded = ncprior.priors.PRIORS["two-stage"](2)
    with pytest.raises(ValueError, match=r"priors\[0\] .* a TwoStagePrior has no density"):
        ncprior.combine(vae, [bounded, one], data, **QUIET)
    plain = torch.distributions.Normal(torch.zeros(2), 1.0)
    with pytest.raises(ValueError, match=r"priors\[1\] .* must be a module .* got a Normal"):
        ncprior.combine(vae, [one, plain], data, **QUIET)
    with pytest.raises(ValueError, match="takes an equation for each latent"):
        ncprior.combine(vae, [one, ncprior.priors.PRIORS["diffusion"](2)], data, **QUIET)
    with pytest.raises(ValueError, match="needs the density that it stands on"):
        CombinedRatio([UnitRatio(), UnitRatio()], [one], [0, 1], 2)(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="places must name one of 2 densities"):
        CombinedRatio([UnitRatio()], [one], [2], 2, StandardNormal(2))
