import math

import pytest
import torch
from toys import SPREAD, Reshape, gaussian_images

import ncprior

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}


def linear_model():
    """One linear layer each way: probabilistic PCA, which can model Gaussian images exactly."""
    encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 2))
    decoder = torch.nn.Sequential(torch.nn.Linear(1, 2), Reshape())
    return ncprior.FlatVAE(encoder, decoder, ncprior.Gaussian(0.5, learned=True), latent_size=1)


def test_elbo_reaches_the_entropy_of_the_data(rng):
    """No model's expected log-density is above minus the entropy, and this one comes near it."""
    images = gaussian_images(4100, rng)
    splits = ncprior.Splits(*torch.arange(4100).split([2000, 2000, 100]))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = linear_model()
    options = {"steps": 500, "batch_size": 200, "learning_rate": 0.05, "evaluate_every": 100}
    history = ncprior.train_vae(vae, images, splits, **options, **QUIET)
    found = [row["validation_elbo"] for row in history]
    best = -2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(SPREAD))
    error = 4 * math.sqrt(2 * 0.5 / 2000)  # log p has variance 1/2 per pixel
    assert found[0] < found[-1]
    assert best - 0.05 - error < found[-1] < best + error
    assert set(history[-1]) == {"step", "elbo", "kl", "validation_elbo"}


def test_kl_warmup():
    """The weight of the KL rises to 1 within its share of the steps."""
    from ncprior.training.vae import _VAEJob

    rows = torch.arange(10)
    data = ncprior.ImageDataset(torch.rand(10, 1, 1, 2, generator=torch.Generator()))
    options = {"batch_size": 10, "seed": 0, "device": torch.device("cpu")}
    for warmup_steps, weights in ((4, [0.25, 0.5, 0.75, 1, 1]), (0, [1, 1, 1, 1, 1])):
        job = _VAEJob(linear_model(), data, rows, rows, warmup_steps=warmup_steps, **options)
        seen = []
        model = lambda images, generator, beta, seen=seen: seen.append(beta)
        for step in range(5):
            job.loss(model, step, torch.Generator())
        assert seen == weights


def test_evaluation_draws_the_same_each_time(digits):
    """So that the curve moves only with the weights: at a rate of next to nothing it is flat."""
    data, splits = digits
    vae = ncprior.build_vae((1, 8, 8), latent_size=2, hidden=(8,))
    options = {"steps": 4, "batch_size": 8, "learning_rate": 1e-12, "evaluate_every": 1}
    history = ncprior.train_vae(vae, data, splits, **options, **QUIET)
    first, *others = (row["validation_elbo"] for row in history)
    assert others == pytest.approx([first] * 3, rel=1e-6)
    assert not vae.training
