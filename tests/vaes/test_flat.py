import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import ExactFlat, linear_vae

import ncprior
import ncprior.normal
from ncprior.walk import from_posterior, from_prior, walk


class OwnEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(12, 6)

    def forward(self, images):
        return self.net(images.flatten(1))


class OwnDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3, 12)

    def forward(self, z):
        return self.net(z).view(-1, 3, 2, 2)


@pytest.fixture
def own():
    """Somebody's own networks, wrapped as the documentation says."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder, decoder = OwnEncoder(), OwnDecoder()
        return ncprior.FlatVAE(encoder, decoder, ncprior.Gaussian(scale=0.1), latent_size=3)


def test_own_networks_go_through_everything(own, rng):
    images = torch.rand(8, 3, 2, 2, generator=rng)
    walked = walk(own, from_posterior(rng), 8, own.encode(images))
    assert own.emit(walked.state).log_prob(images).shape == (8,)
    splits = ncprior.Splits(*torch.arange(8).split([4, 2, 2]))
    options = {"tensorboard": False, "progress": False, "device": "cpu"}
    ncprior.train_vae(own, images, splits, steps=2, batch_size=4, **options)
    assert ncprior.generate(own, None, 5).shape == (5, 3, 2, 2)


RAW = torch.tensor([-3.0, 0.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [
        ("log_variance", (RAW / 2).exp()),
        ("log_scale", RAW.exp()),
        ("softplus", F.softplus(RAW)),
        ("tanh", (5 * RAW.tanh()).exp()),
    ],
)
@pytest.mark.parametrize("pair", [False, True], ids=["one tensor", "a pair"])
def test_posterior_scales(kind, scale, pair):
    loc = torch.ones(1, 3, dtype=torch.float64)
    found = (loc, RAW[None]) if pair else torch.cat([loc, RAW[None]], 1)
    vae = ncprior.FlatVAE(
        Returns(found), nn.Identity(), ncprior.Bernoulli(), 3, posterior_scale=kind
    )
    posterior = vae.group(vae.start(1), vae.encode(torch.zeros(1, 1, 1, 1))).posterior
    torch.testing.assert_close(posterior.loc, loc)
    torch.testing.assert_close(posterior.scale, scale[None])


class Returns(nn.Module):
    """An encoder that says the same of every image."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, _):
        return self.value


def test_softplus_scale_stays_away_from_zero():
    raw = torch.full((1, 2), -200.0)
    vae = ncprior.FlatVAE(
        Returns(raw), nn.Identity(), ncprior.Bernoulli(), 1, posterior_scale="softplus"
    )
    assert vae.encode(torch.zeros(1, 1, 1, 1))[1].item() == pytest.approx(1e-5)


def test_deterministic_encoder(rng):
    """The code is the posterior's mean; its scale is fixed, and no output is spent on it."""
    options = {"posterior_scale": "deterministic", "code_scale": 0.02, "latent_size": 3}
    for network in ("mlp", "conv"):
        vae = ncprior.build_vae((1, 4, 4), network=network, channels=(4, 4), **options).eval()
        images = torch.rand(5, 1, 4, 4, generator=rng)
        loc, scale = vae.encode(images)
        torch.testing.assert_close(loc, vae.encoder(images))
        torch.testing.assert_close(scale, torch.full((5, 3), 0.02))
        again = ncprior.build_vae(vae.config["image_shape"], **without_shape(vae.config))
        assert again.deterministic and again.code_scale == 0.02
    assert vae.deterministic and not ncprior.build_vae((1, 4, 4)).deterministic


def without_shape(config):
    return {name: value for name, value in config.items() if name != "image_shape"}


def test_deterministic_encoder_of_another_size():
    options = {"posterior_scale": "deterministic", "latent_size": 2}
    for found, said in ((torch.zeros(1, 4), r"\(1, 4\)"), ((1, 2), "tuple")):
        vae = ncprior.FlatVAE(Returns(found), nn.Identity(), ncprior.Bernoulli(), **options)
        with pytest.raises(ValueError, match=rf"codes of shape \(1, 2\), got {said}"):
            vae.encode(torch.zeros(1, 1, 1, 1))
    for scale in (0, -1, math.inf, math.nan):
        with pytest.raises(ValueError, match="code_scale must be positive and finite"):
            ncprior.build_vae((1, 4, 4), code_scale=scale)


def test_unknown_posterior_scale():
    with pytest.raises(ValueError, match="log_variance, log_scale, softplus, tanh, got 'std'"):
        ncprior.FlatVAE(nn.Identity(), nn.Identity(), nn.Identity(), 2, posterior_scale="std")


def test_encoder_of_another_size(own):
    own.latent_size = 4
    with pytest.raises(ValueError, match=r"two halves of shape \(2, 4\), got \(2, 3\)"):
        own.encode(torch.zeros(2, 3, 2, 2))


def test_emit_before_a_choice(own):
    with pytest.raises(ValueError, match="z is chosen"):
        own.emit(own.start(2))


def test_with_prior_shares_networks_and_leaves_the_first_alone(own):
    mixture = ncprior.GaussianMixture(2, 3)
    other = own.with_prior(mixture)
    assert other.prior is mixture and isinstance(own.prior, ncprior.priors.StandardNormal)
    assert other.encoder is own.encoder and "prior.means" not in own.state_dict()
    assert other.with_prior(own.prior).prior is own.prior
    # A density that is no module.
    normal = ncprior.normal.Normal(torch.zeros(3), torch.ones(3))
    assert own.with_prior(normal).prior is normal
    assert own.with_prior(normal).with_prior(mixture).prior is mixture
    with pytest.raises(ValueError, match=r"event shape \(3,\), got \(4,\)"):
        own.with_prior(ncprior.GaussianMixture(2, 4))


def test_rows_of_any_prior(own, rng):
    for prior in (own.prior, ncprior.GaussianMixture(2, 3)):
        group = own.with_prior(prior).group(own.start(5))
        assert group.prior.batch_shape == (5,) and group.prior.event_shape == (3,)
        z = group.prior.sample(generator=rng)
        torch.testing.assert_close(group.prior.log_prob(z), prior.log_prob(z))
        assert group.posterior is None and group.context is None


def test_the_toys_are_what_they_say(rng):
    """The aggregate posterior of `linear_vae` and the evidence of `ExactFlat` by simulation."""
    from toys import gaussian_images

    n = 40_000
    vae = linear_vae(0.8, 0.6)
    z = walk(vae, from_posterior(rng), n, vae.encode(gaussian_images(n, rng))).latents[0]
    assert ((z.mean(0) - 0.8).abs() < 4 * 0.6 / math.sqrt(n)).all()
    assert ((z.var(0) / 0.36 - 1).abs() < 4 * math.sqrt(2 / n)).all()
    exact = ExactFlat()
    with torch.no_grad():
        x = exact.emit(walk(exact, from_prior(rng), n).state).sample(generator=rng)
    assert float(x.std()) == pytest.approx(exact.spread, rel=4 / math.sqrt(4 * n))
