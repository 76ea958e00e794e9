"""Priors that are trained with their VAE, through the same loop as any other VAE."""

import pytest
import torch
from torch import nn
from toys import Reshape, gaussian_images

from ncprior.priors import EnergyPrior, LARSPrior, SNISPrior
from ncprior.training import train_vae
from ncprior.vaes import FlatVAE, Gaussian
from ncprior.walk import from_prior, walk

PRIORS = {
    "lars": lambda: LARSPrior(2, hidden=(8,), estimate_draws=64),
    "snis": lambda: SNISPrior(2, hidden=(8,), proposals=16),
    "ebm": lambda: EnergyPrior(2, hidden=(8, 8), langevin_steps=5),
}


def train(name, steps=30):
    images = gaussian_images(300, torch.Generator().manual_seed(0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(2, 4))
        vae = FlatVAE(encoder, Reshape(), Gaussian(0.1), latent_size=2, prior=PRIORS[name]())
    start = {key: value.clone() for key, value in vae.state_dict().items()}
    history = train_vae(
        vae,
        images,
        steps=steps,
        batch_size=64,
        evaluate_every=10,
        device="cpu",
        progress=False,
        tensorboard=False,
    )
    return vae, start, history


@pytest.mark.parametrize("name", PRIORS)
def test_vae_and_prior_learn_together(name):
    before = torch.get_rng_state()
    vae, start, history = train(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert history[-1]["validation_elbo"] > history[0]["validation_elbo"]
    moved = {key for key, value in vae.state_dict().items() if not torch.equal(value, start[key])}
    expected = {key for key, _ in vae.named_parameters()}
    # A constant shift of an energy changes nothing.
    shift = {"prior.network.4.bias"} if name == "ebm" else {"prior.network.2.bias"}
    assert expected - moved <= shift
    assert ("prior.acceptance" in moved) == (name == "lars")
    again, *_ = train(name)
    for key, value in vae.state_dict().items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0, equal_nan=True)


def test_walk_draws_from_the_trained_prior():
    vae, *_ = train("snis", steps=3)
    walked = walk(vae.eval(), from_prior(torch.Generator().manual_seed(1)), 5)
    expected = vae.prior.sample((5,), generator=torch.Generator().manual_seed(1))
    assert torch.equal(walked.latents[0], expected)


def test_energy_and_encoder_do_not_run_away():
    """At the VAE's own rate the KL falls below zero here; on MNIST it went to -4e8 nats."""
    vae, _, history = train("ebm", steps=600)
    assert all(row["kl"] > 0 for row in history)
    images = gaussian_images(300, torch.Generator().manual_seed(0))
    assert vae.encode(images)[0].norm(dim=1).max() < 20
