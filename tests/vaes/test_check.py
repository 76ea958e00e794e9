"""VAEs that are wrapped in another way than they were trained, found out."""

import pytest
import torch
from torch import nn
from toys import SPREAD, TwoGroups, gaussian_images, linear_vae

import ncprior
from ncprior import Bernoulli, FlatVAE, Gaussian, check_vae


@pytest.fixture
def images(rng):
    return gaussian_images(60, rng)


def wrapped(**changes):
    own = linear_vae()
    parts = {"encoder": own.encoder, "decoder": own.decoder, "likelihood": own.likelihood}
    parts |= {"latent_size": 2, "posterior_scale": "log_scale"} | changes
    return FlatVAE(**parts).eval()


class Changed(nn.Module):
    """A module whose output is changed."""

    def __init__(self, module, change):
        super().__init__()
        self.module, self.change = module, change

    def forward(self, x):
        return self.change(self.module(x))


def test_a_vae_as_it_was_trained(images):
    assert check_vae(linear_vae(), images) == []


def test_a_hierarchical_one(rng):
    state = torch.get_rng_state()
    assert check_vae(TwoGroups(), gaussian_images(60, rng, 3).double()) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_probabilities_where_logits_belong(images):
    (said,) = check_vae(wrapped(likelihood=Bernoulli()), images)
    assert "no nearer to the images than their mean" in said and "takes logits" in said


def test_scale_before_mean(images):
    def swap(outputs):
        loc, raw = outputs.chunk(2, -1) if isinstance(outputs, torch.Tensor) else outputs
        return raw, loc

    said = check_vae(wrapped(encoder=Changed(linear_vae().encoder, swap)), images)
    assert any("mean and scale in this order" in text for text in said)


@pytest.mark.parametrize(("trained", "read"), [("log_scale", "log_variance"),
                                               ("log_variance", "log_scale")])  # fmt: skip
def test_another_reading_of_the_scale(rng, trained, read):
    """The posterior's deviation 0.05 is the one that this likelihood makes the best."""
    own = linear_vae(noise=0.05, size=16)
    factor = 2 if trained == "log_variance" else 1
    encoder = Changed(own.encoder, lambda outputs: (outputs[0], factor * outputs[1]))
    images, likelihood = gaussian_images(60, rng, 16), Gaussian(SPREAD / 0.6 * 0.05)
    vaes = [
        FlatVAE(encoder, own.decoder, likelihood, 16, posterior_scale=scale)
        for scale in (trained, read)
    ]
    assert check_vae(vaes[0], images) == []
    (said,) = check_vae(vaes[1], images)
    assert f"posterior_scale={trained!r} instead of {read!r}" in said
    assert vaes[1].posterior_scale == read


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"likelihood": Bernoulli}, "likelihood must be an instance"),
        ({"likelihood": "bernoulli"}, "likelihood must be an instance"),
        ({"decoder": Changed(linear_vae().decoder, lambda x: x.flatten(1))}, "must give images"),
        ({"decoder": Changed(linear_vae().decoder, lambda x: x * torch.nan)}, "to NaN"),
        ({"encoder": Changed(linear_vae().encoder, lambda x: (*x, *x)[:3])}, "got 3 parts"),
        ({"latent_size": 3}, "check latent_size"),
    ],
)
def test_what_cannot_work(images, change, message):
    with pytest.raises(ValueError, match=message):
        check_vae(wrapped(**change), images)


def test_images_of_another_size(rng):
    vae = ncprior.build_vae((1, 8, 8), preset="digits")
    with pytest.raises(ValueError, match="cannot encode and decode images of 3x9x9: RuntimeError"):
        check_vae(vae, torch.rand(10, 3, 9, 9, generator=rng))


def test_a_module_that_is_no_vae(images):
    with pytest.raises(ValueError, match=r"a Linear has no num_groups.*wrap your networks"):
        check_vae(nn.Linear(2, 2), images)


def test_fit_and_diagnosis_say_so(images):
    vae = wrapped(likelihood=Bernoulli())
    options = {"steps": 5, "network_options": {"width": 4, "blocks": 1, "members": 1}}
    with pytest.warns(UserWarning, match="no nearer to the images"):
        prior = ncprior.fit_prior(vae, images, log_z_draws=100, progress=False, **options)
    found = ncprior.diagnose(vae, images, prior=prior, samples=40, latent_metrics=())
    assert any("no nearer to the images" in text for text in found.warnings)
