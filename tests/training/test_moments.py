"""Moments of p r against closed forms, and held-out images that decide."""

import math

import pytest
import torch
from torch import nn
from toys import gaussian_images, linear_vae

import ncprior
from ncprior.data import as_dataset
from ncprior.ratios import MatchedRatio, ResidualRatio
from ncprior.training.evidence import evidence_of
from ncprior.training.heldout import HeldOut
from ncprior.training.moments import match_moments

MEAN, SPREAD = 0.6, 0.7


@pytest.fixture
def parts():
    """q(z) is N(0.6, 0.7^2) in two dimensions."""
    vae = linear_vae(mean=MEAN, spread=SPREAD).double()
    data = as_dataset(gaussian_images(2200, torch.Generator().manual_seed(3)).double())
    table = evidence_of(vae, data, torch.arange(2000), slices=1, seed=0)
    return vae, table, HeldOut(vae, data, torch.arange(2000, 2200), [0], seed=0)


def useless_network():
    """A classifier that knows nothing: log r = 0."""
    network = ResidualRatio(2, width=4, blocks=1).double()
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return network.eval()


def test_between_normals_the_terms_are_the_log_ratio(parts):
    """log N(z; m, s^2) / N(z; 0, 1) is linear and quadratic: nothing is left to the classifier.

    Of 2,000 images a mean has a standard error of s / sqrt(2000) = 0.016.
    """
    found = match_moments(useless_network(), *parts, draws=100_000, seed=0)
    assert found.figures["kept"]
    z = torch.linspace(-0.4, 1.6, 9, dtype=torch.float64)
    z = torch.stack(torch.meshgrid(z, z, indexing="ij"), -1).view(-1, 2)
    true = (-0.5 * ((z - MEAN) / SPREAD) ** 2 + 0.5 * z**2 - math.log(SPREAD)).sum(1)
    off = found.ratio(z) - true
    assert (off - off.mean()).abs().max() < 0.15
    # KL(q || p) = sum (s^2 + m^2 - 1) / 2 - log s is what the bound wins.
    kl = 2 * ((SPREAD**2 + MEAN**2 - 1) / 2 - math.log(SPREAD))
    assert found.figures["heldout_gain"] == pytest.approx(kl, abs=0.1)


def test_moments_are_those_of_the_images(parts):
    """A classifier that errs in the mean: resampled draws of p have the mean of q all the same."""
    network = useless_network()
    biased = lambda z, context=None: 0.5 * z[:, 0] - 0.8 * z[:, 1]
    network.forward = biased
    found = match_moments(network, *parts, draws=100_000, seed=0)
    assert found.figures["kept"]
    p = torch.randn(200_000, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = found.ratio(p).softmax(0)
    mean = weights @ p
    spread = (weights @ (p - mean) ** 2).sqrt()
    assert (mean - MEAN).abs().max() < 0.06 and (spread - SPREAD).abs().max() < 0.06
    before = biased(p).softmax(0) @ p
    assert (before - MEAN).abs().max() > 0.5


def test_held_out_images_decide(parts):
    """Terms that suit the images fitted on, and not the held-out ones, are dropped."""
    vae, table, _ = parts
    other = as_dataset(gaussian_images(200, torch.Generator().manual_seed(3)) ** 4)
    network = useless_network()
    held = HeldOut(vae, other, torch.arange(200), [0], seed=0)
    found = match_moments(network, vae, table, held, draws=100_000, seed=0)
    assert not found.figures["kept"] and found.figures["heldout_gain"] < 0
    assert found.ratio is network


def test_too_few_draws_that_count(parts):
    network = useless_network()
    network.forward = lambda z, context=None: 40 * z[:, 0]
    found = match_moments(network, *parts, draws=100_000, seed=0)
    assert found.ratio is network and not found.figures["kept"]
    assert found.figures["effective_draws"] < 10 == 2 * found.figures["numbers"]


def test_terms_that_leave_too_few_draws_are_dropped():
    """q is so far from p that p r with its moments lies where hardly any draw of p does."""
    vae = linear_vae(mean=4.0, spread=0.4).double()
    data = as_dataset(gaussian_images(2200, torch.Generator().manual_seed(3)).double())
    table = evidence_of(vae, data, torch.arange(2000), slices=1, seed=0)
    held = HeldOut(vae, data, torch.arange(2000, 2200), [0], seed=0)
    network = useless_network()
    found = match_moments(network, vae, table, held, draws=20_000, seed=0)
    assert found.ratio is network and not found.figures["kept"]
    assert found.figures["effective_draws"] == pytest.approx(20_000)
    assert found.figures["effective_draws_matched"] < 10
    assert "heldout_gain" not in found.figures


def test_one_latent():
    vae, images = linear_vae(size=1), gaussian_images(300, torch.Generator().manual_seed(1), 1)
    prior = ncprior.fit_prior(
        vae, images, steps=20, network_options={"width": 8, "blocks": 1, "members": 2},
        log_z_draws=2000, progress=False,
    )  # fmt: skip
    assert prior.record["groups"][0]["moments"]["numbers"] == 2
    assert ncprior.draw(vae, prior, 5, seed=0).latents[0].shape == (5, 1)


def test_terms_are_bounded_far_away():
    ratio = MatchedRatio(useless_network())
    ratio.linear.fill_(1.0)
    ratio.quadratic.copy_(torch.eye(2))
    ratio.radius.fill_(3.0)
    far = torch.tensor([[3.0, 0.0], [30.0, 0.0], [3e4, 0.0]], dtype=torch.float64)
    assert torch.allclose(ratio.tilt(far), torch.tensor(12.0, dtype=torch.float64))
    assert ratio.tilt(torch.zeros(1, 2, dtype=torch.float64)).isfinite().all()


def test_through_fit_save_and_load(tmp_path):
    images = gaussian_images(600, torch.Generator().manual_seed(1))
    options = {"steps": 100, "evaluate_every": 50, "log_z_draws": 2000, "progress": False}
    options["network_options"] = {"width": 8, "blocks": 1, "members": 2}
    vae = linear_vae(mean=MEAN, spread=SPREAD)
    prior = ncprior.fit_prior(vae, images, **options)
    assert isinstance(prior.ratios[0], MatchedRatio)
    group = prior.record["groups"][0]
    assert group["moments"]["kept"] and group["moments"]["heldout_gain"] > 0
    prior.save_pretrained(tmp_path)
    again = ncprior.NoiseContrastivePrior.from_pretrained(tmp_path)
    z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.log_ratio(0, z), prior.log_ratio(0, z))
    for sampler in ("sir", "langevin"):
        drawn = ncprior.draw(vae, again, 1000, sampler=sampler, seed=0).latents[0]
        assert (drawn.mean(0) - MEAN).abs().max() < 0.15
    plain = ncprior.fit_prior(vae, images, match_moments=False, **options)
    assert not isinstance(plain.ratios[0], MatchedRatio)
    assert "moments" not in plain.record["groups"][0]


def test_stages_are_not_matched():
    with pytest.raises(ValueError, match="match_moments needs flat latents"):
        ncprior.fit_prior(
            linear_vae(), gaussian_images(50, torch.Generator()), stages=2, match_moments=True
        )
