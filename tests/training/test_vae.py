import json
import math
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import SPREAD, Reshape, gaussian_images, interrupt_at

import ncprior
from ncprior.normal import Normal
from ncprior.training import processes
from ncprior.training.loop import Interrupted
from ncprior.training.regularisation import NormPenalty
from ncprior.training.vae import Elbo, _VAEJob, kl_ramp
from ncprior.vaes.likelihoods import BernoulliEmission
from ncprior.vaes.nvae.checkpoint import load_published
from ncprior.vaes.nvae.flows import FlowedNormal

DATA = Path(__file__).resolve().parents[1] / "vaes" / "nvae" / "data"

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


def weights_seen(steps=5, **options):
    """What follows the images and the generator in each call of the model."""
    rows = torch.arange(10)
    data = ncprior.ImageDataset(torch.rand(10, 1, 1, 2, generator=torch.Generator()))
    options = {"batch_size": 10, "seed": 0, "device": torch.device("cpu")} | options
    job, seen = _VAEJob(linear_model(), data, rows, rows, **options), []
    for step in range(steps):
        job.loss(lambda images, generator, *rest: seen.append(rest), step, torch.Generator())
    return seen


def test_kl_warmup():
    """The weight of the KL rises to 1 within its share of the steps."""
    for warmup_steps, weights in ((4, [0.25, 0.5, 0.75, 1, 1]), (0, [1, 1, 1, 1, 1])):
        assert weights_seen(warmup_steps=warmup_steps) == [(beta,) for beta in weights]


def test_kl_start():
    """NVAE's clamp((t - start) / length, 1e-4, 1), with t the number of the step from 1."""
    found = weights_seen(7, warmup_steps=4, start_steps=2)
    assert [beta for (beta,) in found] == [1e-4, 1e-4, 0.25, 0.5, 0.75, 1, 1]
    assert [kl_ramp(t, start=2, length=0) for t in range(4)] == [1e-4, 1e-4, 1, 1]
    steps = 1_000_000
    beta = kl_ramp(50_000 - 1, start=1e-4 * steps, length=0.3 * steps)
    assert beta == pytest.approx((50_000 - 100) / 300_000)


def test_norm_weight_falls_as_the_kl_rises():
    """Its logarithm is linear in beta: halfway between 10 and 0.1 lies 1."""
    found = weights_seen(5, warmup_steps=4, norm_penalty=0.1, norm_penalty_initial=10.0)
    betas, weights, iterations = zip(*found, strict=True)
    assert betas == (0.25, 0.5, 0.75, 1, 1)
    assert weights == pytest.approx((10**0.5, 1, 10**-0.5, 0.1, 0.1))
    assert iterations == (40, 4, 4, 4, 4)
    constant = weights_seen(5, warmup_steps=4, norm_penalty=0.1)
    assert [weight for _, weight, _ in constant] == pytest.approx([0.1] * 5)


@pytest.mark.parametrize("name", ["mnist-tiny", "cifar-tiny"])
def test_published_loss(name, monkeypatch):
    """The whole loss of the published program, from its checkpoint, images and noise."""
    with np.load(DATA / f"{name}.npz") as file:
        arrays = {k: torch.from_numpy(file[k]) for k in file.files}
    told = json.loads((DATA / f"{name}.json").read_text())
    images = arrays["x"]
    if told["likelihood_crop_28"]:
        images = images[:, :, 2:-2, 2:-2]
    vae = load_published(DATA / f"{name}.pt")
    elbo = Elbo(vae, balanced=True, norms=NormPenalty(vae))
    for group in told["spectral_groups"]:
        rows, columns = group["matrix_shape"]
        u = arrays[f"spectral{group['index']:02d}_u_init"]
        elbo.norms.get_buffer(f"u_{rows}x{columns}").copy_(u)

    def loss(*arguments):
        noise = iter(arrays[f"group{k:02d}_eps"] for k in range(told["num_groups"]))
        monkeypatch.setattr(Normal, "_noise", lambda *_: next(noise))
        with torch.no_grad():
            return elbo(images, None, *arguments)

    def close(found, expected):  # the tolerance of the recording
        torch.testing.assert_close(found, expected, rtol=5e-5, atol=5e-5)

    constants = told["constants"]
    found, _ = loss(constants["beta"], constants["lambda"], 40)
    close(found, arrays["train_loss"])
    found, figures = loss(constants["beta"])
    close(found, (arrays["recon_loss"] + arrays["balanced_kl"]).mean())
    found, figures = loss(1.0)
    close(found, arrays["nelbo"].mean())
    close(found, (arrays["recon_loss"] + arrays["balanced_kl_beta1"]).mean())
    close(figures["elbo"], -found)


@pytest.fixture
def nvae():
    """A chain of groups, with or without flows, or its activations computed twice."""

    def make(**options):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ncprior.build_vae((1, 8, 8), preset="nvae-digits", **options)

    return make


def test_kl_weight_narrows_the_posterior(rng):
    """With a weight w the best q(z|x) under a linear decoder is that of noise w sigma^2."""
    c, sigma, weight = 0.3, 0.1, 0.1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(2, 4))
        decoder = Reshape().requires_grad_(False)
    decoder.layer.weight.copy_(c * torch.eye(2))
    decoder.layer.bias.fill_(0.5)
    options = {"latent_size": 2, "posterior_scale": "log_scale"}
    vae = ncprior.FlatVAE(encoder, decoder, ncprior.Gaussian(sigma), **options)
    images = gaussian_images(1000, rng)
    options = {"steps": 600, "batch_size": 200, "learning_rate": 0.1, "kl_weight": weight}
    ncprior.train_vae(vae, images, **options, **QUIET)
    loc, scale = vae.encode(images)
    variance = 1 / (1 + c**2 / (weight * sigma**2))
    # The steps end with a rate of 0: what is left is far below a per cent.
    torch.testing.assert_close(scale.mean(), torch.tensor(variance**0.5), rtol=0.01, atol=0)
    slope = torch.linalg.lstsq(images.flatten(1) - 0.5, loc).solution
    best = variance * c / (weight * sigma**2) * torch.eye(2)
    torch.testing.assert_close(slope, best, rtol=0, atol=0.02 * float(best[0, 0]))


NVAE_TRAINING = {
    "steps": 12,
    "batch_size": 16,
    "optimizer": "adamax",
    "learning_rate": 0.01,
    "learning_rate_end": 1e-4,
    "eps": 1e-3,
    "weight_decay": 3e-4,
    "warmup": 2,
    "kl_warmup": 0.5,
    "kl_start": 0.1,
    "kl_balance": True,
    "norm_penalty": 0.1,
    "norm_penalty_initial": 1.0,
    "evaluate_every": 6,
    "checkpoint_every": 4,
}


def test_nvae_trains_and_resumes(nvae, digits, tmp_path):
    """With all that it needs; after Ctrl-C it ends with the same weights to the bit."""
    expected = nvae()
    history = ncprior.train_vae(expected, *digits, **NVAE_TRAINING, **QUIET)
    assert history[0]["validation_elbo"] < history[1]["validation_elbo"]
    assert history[1]["norm_penalty"] > 0
    stopped = interrupt_at(nvae(), 7, lambda: signal.raise_signal(signal.SIGINT))
    options = NVAE_TRAINING | QUIET | {"directory": tmp_path}
    with pytest.raises(Interrupted):
        ncprior.train_vae(stopped, *digits, **options)
    found = nvae()
    assert ncprior.train_vae(found, *digits, **options, resume=True) == history
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_nvae_with_activations_computed_twice(nvae, digits):
    """The same weights and running statistics."""
    plain, again = nvae(), nvae(checkpoint_activations=True)
    for vae in (plain, again):
        ncprior.train_vae(vae, *digits, **NVAE_TRAINING | QUIET | {"steps": 3})
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_flows_are_never_inverted_in_training(nvae, digits, monkeypatch):
    """log q is taken where the posterior was drawn; anywhere else it would be slow."""
    monkeypatch.delattr(FlowedNormal, "log_prob")
    vae = nvae(num_flows=1)
    ncprior.train_vae(vae, *digits, **NVAE_TRAINING | QUIET | {"steps": 2})


def test_norm_penalty_holds_norms_down(digits):
    """With its weight large, training lowers what it sums; without, it does not."""
    found = {}
    for weight in (0.0, 100.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            vae = ncprior.build_vae((1, 8, 8), network="conv", channels=(4, 4), latent_size=2)
        before = float(NormPenalty(vae)(vae, 100).detach())
        options = {"steps": 40, "batch_size": 16, "learning_rate": 0.01, "norm_penalty": weight}
        ncprior.train_vae(vae, *digits, **options, **QUIET)
        found[weight] = float(NormPenalty(vae)(vae, 100).detach()) / before
    assert found[100.0] < 0.9 < found[0.0]


def test_densities_are_computed_in_single_precision(digits, monkeypatch):
    """Under bfloat16 the networks round, the images, the KL and the likelihood do not."""
    seen = {}

    def spied(owner, name):
        original = getattr(owner, name)

        def spy(self, value):
            tensors = [value, *vars(self).values()]
            if isinstance(value, Normal):
                tensors += [value.loc, value.scale]
            seen.setdefault(name, []).extend(
                t.dtype for t in tensors if isinstance(t, torch.Tensor)
            )
            seen.setdefault("autocast", []).append(torch.is_autocast_enabled("cpu"))
            return original(self, value)

        monkeypatch.setattr(owner, name, spy)

    vae = ncprior.build_vae((1, 8, 8), network="conv", channels=(4, 4), latent_size=2)
    encode, given = vae.encode, []

    def spied_encode(images):
        evidence = encode(images)
        given.append((images, evidence[0].dtype))
        return evidence

    vae.encode = spied_encode
    spied(Normal, "kl")
    spied(BernoulliEmission, "log_prob")
    monkeypatch.setattr(processes, "multiplies_bfloat16", lambda: True)
    data, splits = digits
    options = {"steps": 1, "batch_size": 1000, "precision": "bf16-mixed"}
    history = ncprior.train_vae(vae, data, splits, **options, **QUIET)
    assert set(seen["kl"] + seen["log_prob"]) == {torch.float32}
    assert set(seen["autocast"]) == {False}
    images, dtype = given[0]
    assert dtype == torch.bfloat16
    levels = images * 16  # the digits have 17 grey values, stored in bytes
    assert images.dtype == torch.float32 and not torch.equal(images, images.bfloat16().float())
    assert levels.max() <= 16 and math.isfinite(history[0]["elbo"])


def test_evaluation_draws_the_same_each_time(digits):
    """So that the curve moves only with the weights: at a rate of next to nothing it is flat."""
    data, splits = digits
    vae = ncprior.build_vae((1, 8, 8), latent_size=2, hidden=(8,))
    options = {"steps": 4, "batch_size": 8, "learning_rate": 1e-12, "evaluate_every": 1}
    history = ncprior.train_vae(vae, data, splits, **options, **QUIET)
    first, *others = (row["validation_elbo"] for row in history)
    assert others == pytest.approx([first] * 3, rel=1e-6)
    assert not vae.training
