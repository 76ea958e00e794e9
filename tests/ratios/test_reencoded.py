"""Ratios that see latents decoded and encoded again, against closed forms."""

import copy
import math

import pytest
import torch
from torch import nn
from toys import TwoGroups, gaussian_images, linear_vae, true_log_ratio

import ncprior
from ncprior.normal import Normal
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import ReencodedRatio, ResidualRatio
from ncprior.ratios.reencoded import BENT_AT, features, reencode, view_of
from ncprior.storage import fingerprint

MEAN, SPREAD, NOISE = 0.8, 0.6, 0.3


@pytest.fixture
def vae():
    return linear_vae(MEAN, SPREAD, NOISE).double()


@pytest.fixture
def z():
    """Latents whose images are inside [0, 1]."""
    noise = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return MEAN + SPREAD * noise


def test_the_way_there_and_back(vae, z):
    """The toy's decoder undoes its encoder up to the gain sqrt(s^2 - t^2) / s of the posterior."""
    images, posterior = reencode(vae, z)
    gain = math.sqrt(SPREAD**2 - NOISE**2) / SPREAD
    torch.testing.assert_close(posterior.loc, MEAN + gain * (z - MEAN))
    torch.testing.assert_close(posterior.scale, torch.full_like(z, NOISE))
    torch.testing.assert_close(images.flatten(1), 0.5 + 0.08 / SPREAD * (z - MEAN))


def test_features_against_their_definitions(vae, z):
    (images, q), found = reencode(vae, z), features(vae, z)
    p = Normal(torch.zeros_like(z), torch.ones_like(z))
    assert found.shape == (50, 3 * 2 + 5)
    torch.testing.assert_close(found[:, :2], z)
    torch.testing.assert_close(found[:, 2:4], q.loc - z)
    torch.testing.assert_close(found[:, 4:6], q.scale.log())
    bent = lambda x: x / (1 + x.abs() / BENT_AT)
    torch.testing.assert_close(found[:, 6], bent(q.log_prob(z) - p.log_prob(z)))
    torch.testing.assert_close(found[:, 7], (z**2).sum(1))
    torch.testing.assert_close(found[:, 8], bent((((z - q.loc) / NOISE) ** 2).sum(1)))
    torch.testing.assert_close(found[:, 9], q.kl(p))
    torch.testing.assert_close(found[:, 10], (images * (1 - images)).flatten(1).sum(1))
    vae.decoder.hidden = lambda z: z.repeat(1, 4) ** 3
    torch.testing.assert_close(features(vae, z), torch.cat([found, z.repeat(1, 4) ** 3], 1))
    many = z.repeat(20, 1)
    torch.testing.assert_close(view_of(vae)(many), features(vae, many))


def test_a_fit_finds_the_true_ratio():
    """q(z) is N(m, s^2): a short fit is near log q/p where q has its mass."""
    vae = linear_vae(MEAN, SPREAD, NOISE)
    data = gaussian_images(4000, torch.Generator().manual_seed(2))
    prior = ncprior.fit_prior(
        vae, data, reencode=True, steps=400, match_moments=False, progress=False, tensorboard=False,
        network_options={"members": 2, "width": 32}, log_z_draws=20_000,
    )  # fmt: skip
    assert isinstance(prior.ratios[0], ReencodedRatio)
    noise = torch.randn(4000, 2, generator=torch.Generator().manual_seed(3))
    z = MEAN + SPREAD * noise
    off = prior.log_ratio(0, z) - true_log_ratio(z, MEAN, SPREAD)
    assert off.square().mean().sqrt() < 0.15
    drawn = ncprior.draw(vae, prior, 4000, seed=0, proposals=256).latents[0]
    assert (drawn.mean(0) - MEAN).abs().max() < 0.06
    assert (drawn.std(0) - SPREAD).abs().max() < 0.06


def ratio_on(vae):
    network = ResidualRatio(11, width=8, blocks=1, members=2).double()
    return ReencodedRatio(network.eval(), 2, vae).eval()


def test_the_vae_is_no_part_of_the_ratio(vae, z):
    ratio = ratio_on(vae)
    assert all(name.startswith("network.") for name in ratio.state_dict())
    assert ratio.latent_shape == (2,) and ratio.context_shape is None
    before = fingerprint(vae)
    point = z.requires_grad_(True)
    (slope,) = torch.autograd.grad(ratio(point).sum(), point)
    nudge = 1e-5 * torch.ones_like(z)
    with torch.no_grad():
        change = (ratio(z + nudge) - ratio(z - nudge)) / 2e-5
    torch.testing.assert_close(slope.sum(1), change, rtol=1e-4, atol=1e-6)
    assert fingerprint(vae) == before
    want = ratio(z)
    vae.decoder.layer = nn.Sequential(vae.decoder.layer, nn.Dropout(0.5)).train()
    torch.testing.assert_close(ratio(z), want)  # as in evaluation
    assert vae.decoder.layer.training, "the VAE's mode was changed"


def test_kept_and_read_again(vae, z, tmp_path):
    prior = NoiseContrastivePrior([ratio_on(vae)], vae.prior).eval()
    prior.record["vae"] = fingerprint(vae)
    prior.save_pretrained(tmp_path)
    want = prior.log_ratio(0, z)
    known = NoiseContrastivePrior.from_pretrained(tmp_path, vae=vae)
    torch.testing.assert_close(known.double().log_ratio(0, z), want)
    alone = NoiseContrastivePrior.from_pretrained(tmp_path).double()
    with pytest.raises(ValueError, match=r"needs the VAE.*vae=vae"):
        alone.log_ratio(0, z)
    with pytest.raises(ValueError, match="fitted on another VAE"):
        alone.attach(linear_vae(0.1, SPREAD, NOISE).double())
    alone.under(vae)
    torch.testing.assert_close(alone.log_ratio(0, z), want)


def test_a_copy_looks_through_a_copy(vae, z):
    """So a VAE that is trained on does not move the ratio that it is trained under."""
    prior = NoiseContrastivePrior([ratio_on(vae)], vae.prior).eval()
    other, want = copy.deepcopy(prior), prior.log_ratio(0, z)
    with torch.no_grad():
        vae.decoder.layer.bias.add_(0.1)
    torch.testing.assert_close(other.log_ratio(0, z), want)
    assert not torch.allclose(prior.log_ratio(0, z), want)


def test_bfloat16_proposals(vae, z):
    prior = NoiseContrastivePrior([ratio_on(vae)], vae.prior).eval()
    rough = prior.in_bfloat16().weigher(0, vae.group(vae.start(5)))
    exact = prior.weigher(0, vae.group(vae.start(5)))
    pool, rows = z.view(5, 10, 2), slice(0, 5)
    torch.testing.assert_close(rough(pool, rows), exact(pool, rows), rtol=0, atol=0.1)


def test_what_cannot_be_reencoded():
    data = torch.rand(200, 1, 1, 3)
    flat, prior = linear_vae(), Normal(torch.zeros(2, 1, 1), torch.ones(2, 1, 1), event_dim=3)
    maps = ncprior.FlatVAE(flat.encoder, flat.decoder, flat.likelihood, 2, prior=prior)
    with pytest.raises(ValueError, match="reencode needs flat latents, this VAE has maps"):
        ncprior.fit_prior(maps, data[..., :2], reencode=True)
    with pytest.raises(ValueError, match="one latent group, this one has 2"):
        ncprior.fit_prior(TwoGroups(), data, reencode=True)
    with pytest.raises(ValueError, match=r"reencode needs one stage, got stages = 3"):
        ncprior.fit_prior(linear_vae(), data[..., :2], reencode=True, stages=3)
