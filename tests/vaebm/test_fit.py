import math
import os
import signal

import pytest
import torch
from lightning_fabric.plugins import Precision

from ncprior.data import ImageDataset
from ncprior.metrics.features import pixels
from ncprior.training.loop import Diverged, Interrupted
from ncprior.vaebm import ImageEnergy, Joint, draw_with_energy, fit_energy
from ncprior.vaebm.job import EnergyJob, Starts, likelihood_loss

from .models import SIGMA, C, Linear, linear_vae, tilted_prior

SHIFT = 0.03
VARIANCE = C**2 + SIGMA**2  # of each pixel under the VAE


def images(n=2000, shift=SHIFT):
    """Pixels N(0.5 + shift, VARIANCE), where the VAE has N(0.5, VARIANCE)."""
    generator = torch.Generator().manual_seed(5)
    return 0.5 + shift + math.sqrt(VARIANCE) * torch.randn(n, 1, 1, 2, generator=generator)


def small(**options):
    return {
        "network": "mlp",
        "network_options": {"hidden": (16,)},
        "spectral_penalty": 0.0,
        "steps": 40,
        "batch_size": 64,
        "langevin_steps": 5,
        "step_size": 0.2,
        "evaluate_every": 10,
        "checkpoint_every": 10,
        "heldout_draws": 200,
        "starts": 200,
        "proposals": 20,
        "device": "cpu",
        "tensorboard": False,
        "progress": False,
    } | options


def make_job(energy, data, batch_size, **options):
    joint = Joint(linear_vae())
    starts = Starts(joint, seed=0, **options)
    return EnergyJob(
        energy, joint, data, torch.arange(len(data)), starts, held=data.raw(torch.arange(20)),
        held_starts=torch.zeros(20, 2, dtype=torch.float64), features=pixels(),
        batch_size=batch_size, precision=Precision(), seed=0, of={},
    )  # fmt: skip


def test_likelihood_loss_by_hand():
    at_data, at_runs = torch.tensor([1.0, 3.0]), torch.tensor([4.0])
    assert float(likelihood_loss(at_data, at_runs)) == 2 - 4
    assert float(likelihood_loss(at_data, at_runs, 0.1)) == pytest.approx(
        -2 + 0.1 * (5 + 16), abs=1e-6
    )


@pytest.mark.parametrize("theta", [0.0, 3.0])
def test_gradient_is_that_of_the_likelihood(theta, rng):
    """E = -theta sum(x): the model is normal, of mean 0.5 + theta VARIANCE in each pixel, and

    the gradient of minus the mean log-likelihood is sum(E_model[x] - mean x). The dynamics reach
    that mean without bias but for 0.9^60 = 0.002 of the way.
    """
    n = 4000
    data = ImageDataset(images(n))
    energy = ImageEnergy(Linear(theta), langevin_steps=60, step_size=0.2)
    job = make_job(energy, data, n)
    loss, figures = job.loss(job.module, 0, rng)
    (gradient,) = torch.autograd.grad(loss, [energy.network.theta])
    model = 2 * (0.5 + theta * VARIANCE)
    expected = model - float(data.images.double().sum((1, 2, 3)).mean())
    # The batch is all the data; runs have a variance larger by at most 1 / (1 - 0.05).
    tolerance = 4 * math.sqrt(2 * VARIANCE / 0.95 / n) + 0.002 * 2 * theta * VARIANCE
    assert abs(float(gradient) - expected) < tolerance
    assert abs(expected) > 2 * tolerance  # the test could fail
    assert float(figures["energy_gap"]) == pytest.approx(-float(loss.detach()))


@pytest.mark.parametrize("pixel_noise", [True, False])
def test_fit_moves_samples_to_the_data(pixel_noise):
    """The mean of the samples, off by SHIFT, comes at least two thirds of the way."""
    vae = linear_vae()
    energy = fit_energy(
        vae, None, images(),
        **small(steps=100, learning_rate=5e-2, langevin_steps=12, pixel_noise=pixel_noise),
    )  # fmt: skip
    draws = draw_with_energy(vae, None, energy, 1000)
    found = float(draws.images.double().mean()) - 0.5
    assert abs(found - SHIFT) < SHIFT / 3
    record = energy.record
    assert record["heldout_fd"] < record["heldout_fd_without"] / 3
    assert record["best_step"] > 0 and record["warnings"] == []
    assert not any(p.requires_grad for p in energy.parameters())


def test_fit_on_an_ncp_leaves_vae_and_prior_as_they_are():
    vae, prior = linear_vae(), tilted_prior(0.5)
    before = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    energy = fit_energy(vae, prior, images(300), **small())
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())
    energy.check(vae, prior)
    with pytest.raises(ValueError, match="another prior"):
        energy.check(vae, None)


@pytest.mark.parametrize("replay", [0.0, 0.6])
@pytest.mark.parametrize("at", [7, 23])
def test_resumed_run_is_the_same(at, replay, tmp_path, monkeypatch):
    options, data, vae = small(replay=replay, replay_warmup=10), images(300), linear_vae()
    expected = fit_energy(vae, None, data, **options)
    loss = EnergyJob.loss

    def interrupted(self, model, step, generator):
        if step == at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(EnergyJob, "loss", interrupted)
        with pytest.raises(Interrupted):
            fit_energy(vae, None, data, directory=tmp_path, part="-base", **options)
    assert (tmp_path / "energy-base-checkpoint.pt").exists()
    found = fit_energy(vae, None, data, directory=tmp_path, part="-base", resume=True, **options)
    assert found.record == expected.record
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_resumed_under_another_prior(tmp_path, monkeypatch):
    options, data, vae = small(directory=tmp_path), images(300), linear_vae()
    loss = EnergyJob.loss

    def interrupted(self, model, step, generator):
        os.kill(os.getpid(), signal.SIGINT)
        return loss(self, model, step, generator)

    with monkeypatch.context() as patch:
        patch.setattr(EnergyJob, "loss", interrupted)
        with pytest.raises(Interrupted):
            fit_energy(vae, None, data, **options)
    with pytest.raises(ValueError, match=r"its prior \(fingerprint\) was"):
        fit_energy(vae, tilted_prior(0.5), data, resume=True, **options)


def test_last_good_state_is_kept(monkeypatch):
    """From step 25 on every run meets NaN: the weights of an earlier figure come back."""
    loss = EnergyJob.loss

    def broken(self, model, step, generator):
        found, figures = loss(self, model, step, generator)
        return (found * math.nan if step >= 25 else found), figures

    monkeypatch.setattr(EnergyJob, "loss", broken)
    energy = fit_energy(linear_vae(), None, images(300), **small(retries=1))
    assert energy.record["steps"] == 20 and energy.record["best_step"] <= 20
    assert "diverged" in energy.record["warnings"][0]
    assert all(p.isfinite().all() for p in energy.parameters())


def test_dynamics_that_break_down_are_a_divergence(rng):
    job = make_job(
        ImageEnergy(Linear(), langevin_steps=2, step_size=0.1), ImageDataset(images(30)), 4
    )
    energy = ImageEnergy(Linear(math.inf), langevin_steps=2, step_size=0.1)
    with pytest.raises(Diverged, match="Langevin run broke down"):
        job._run(torch.zeros(3, 4, dtype=torch.float64), energy, rng)


def test_replay_goes_on_where_runs_ended(rng):
    starts = Starts(Joint(linear_vae()), replay=1.0, buffer=6, seed=0)
    first, rows = starts(4, 0, rng)
    assert torch.equal(first, starts.buffer[rows])
    starts.keep(rows, torch.full_like(first, 7.0))
    assert torch.equal(starts.buffer[rows], torch.full_like(first, 7.0))
    rising = Starts(Joint(linear_vae()), replay=0.5, warmup=100, buffer=2000, seed=0)
    rising.buffer.fill_(7.0)
    for step, share in [(0, 0.005), (49, 0.25), (99, 0.5), (400, 0.5)]:
        old = float((rising(4000, step, rng)[0][:, 0] == 7).double().mean())
        assert abs(old - share) < 4 * math.sqrt(share * (1 - share) / 4000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"langevin_steps": 0}, "langevin_steps must be at least 1"),
        ({"replay": 1.5}, "replay must be between 0 and 1"),
        ({"step_size": 0.0}, "step_size positive"),
        ({"spectral_penalty": -1.0}, "penalties not negative"),
        ({"network": "transformer"}, "network must be one of conv, mlp"),
        ({"heldout": 0.0}, "heldout leaves 30 images to fit on and 0 held out"),
        ({"heldout_draws": 1}, "heldout_draws must be at least 2"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit_energy(linear_vae(), None, images(30), **small(**options))


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"images of shape \(1, 1, 2\) .* got \(1, 2, 2\)"):
        fit_energy(linear_vae(), None, torch.rand(30, 1, 2, 2), **small())
