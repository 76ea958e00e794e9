import pytest
import torch
from toys import SPREAD as SPREAD_OF_IMAGES
from toys import Reshape, TwoGroups, gaussian_images, true_log_ratio

import ncprior
from ncprior.normal import StandardNormal
from ncprior.training.finetune import finetune_vae

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}
MEAN, SPREAD, SLOPE, SIGMA = 0.8, 0.6, 0.2, 0.1


class Exact(torch.nn.Module):
    """log N(z; MEAN, SPREAD^2) - log N(z; 0, 1), up to a constant that log Z takes away."""

    def __init__(self):
        super().__init__()
        self.constant = torch.nn.Parameter(torch.tensor(1.0))

    def forward(self, z, context=None):
        return true_log_ratio(z, MEAN, SPREAD) + self.constant


class Standardised(torch.nn.Module):
    def forward(self, images):
        return (images.flatten(1) - 0.5) / SPREAD_OF_IMAGES


@pytest.fixture
def vae():
    """A linear VAE whose decoder x = 0.5 + SLOPE z stays as it is."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(Standardised(), torch.nn.Linear(2, 4))
        decoder = Reshape().requires_grad_(False)
    decoder.layer.weight.copy_(SLOPE * torch.eye(2))
    decoder.layer.bias.fill_(0.5)
    options = {"latent_size": 2, "posterior_scale": "log_scale"}
    return ncprior.FlatVAE(encoder, decoder, ncprior.Gaussian(SIGMA), **options)


@pytest.fixture
def prior():
    return ncprior.NoiseContrastivePrior([Exact()], StandardNormal(2))


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_reaches_the_posterior_under_the_new_prior(vae, prior, rng):
    """Under N(MEAN, SPREAD^2) and x = 0.5 + SLOPE z + SIGMA noise it is known."""
    images = gaussian_images(1000, rng)
    before = weights(vae), weights(prior)
    tuned = finetune_vae(vae, prior, images, steps=400, learning_rate=0.1, batch_size=400, **QUIET)
    loc, scale = tuned.encode(images)

    variance = 1 / (SPREAD**-2 + (SLOPE / SIGMA) ** 2)
    best = variance * (MEAN / SPREAD**2 + SLOPE / SIGMA**2 * (images.flatten(1) - 0.5))
    # The rate ends at 0; what the noise of the last steps leaves is below 2 per cent.
    torch.testing.assert_close(scale.mean(), torch.tensor(variance**0.5), rtol=0.02, atol=0)
    assert (loc - best).abs().mean() < 0.02 * SPREAD

    for module, kept in zip((vae, prior), before, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(value, kept[name])
    assert tuned.prior is not vae.prior
    assert isinstance(tuned.prior, StandardNormal)
    assert not tuned.training
    assert prior.ratios[0].constant.requires_grad  # left as it was


def test_base_of_the_prior_takes_the_place_of_the_vaes_own(vae, rng):
    base = ncprior.GaussianMixture(2, 2)
    prior = ncprior.NoiseContrastivePrior([Exact()], base)
    images = gaussian_images(200, rng)
    tuned = finetune_vae(vae, prior, images, steps=1, batch_size=20, **QUIET)
    assert isinstance(tuned.prior, ncprior.GaussianMixture)
    refitted = ncprior.fit_prior(
        tuned, images, steps=1, batch_size=10, log_z_draws=0, progress=False, tensorboard=False
    )
    assert isinstance(refitted.base, ncprior.GaussianMixture)


def test_rejects_what_cannot_work(vae, prior):
    images = torch.rand(10, 1, 1, 2)
    prior.record["vae"] = "another"
    with pytest.raises(ValueError, match="another VAE"):
        finetune_vae(vae, prior, images, **QUIET)
    with pytest.raises(ValueError, match="one latent group"):
        finetune_vae(TwoGroups(), prior, images, **QUIET)
