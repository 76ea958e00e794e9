import json

import pytest
import torch

from ncprior.normal import StandardNormal
from ncprior.priors import GaussianMixture
from ncprior.vaebm import (
    EnergyNetwork,
    FlatEnergyNetwork,
    ImageEnergy,
    Joint,
    draw_with_energy,
)
from ncprior.vaebm.energy import fingerprints
from ncprior.vaes import build_vae

from .models import Linear, Quadratic, linear_vae, tilted_prior

SHAPE = (1, 8, 8)
MADE = {
    "conv": lambda: EnergyNetwork(SHAPE, channels=(4, 6), blocks=2),
    "mlp": lambda: FlatEnergyNetwork(SHAPE, hidden=(7, 5)),
}


def an_energy(kind="conv"):
    energy = ImageEnergy(MADE[kind](), langevin_steps=7, step_size=0.03, pixel_noise=False)
    torch.nn.init.normal_(energy.network.out.weight, generator=torch.Generator().manual_seed(1))
    energy.record = {"seed": 3, "heldout_fd": 0.25}
    return energy


@pytest.mark.parametrize("kind", MADE)
def test_saved_and_loaded(kind, tmp_path, rng):
    energy, images = an_energy(kind), torch.rand(4, *SHAPE, generator=rng)
    energy.save_pretrained(tmp_path / "energy")
    found = ImageEnergy.from_pretrained(tmp_path / "energy")
    assert torch.equal(found(images), energy(images))
    for name in ("langevin_steps", "step_size", "pixel_noise", "record"):
        assert getattr(found, name) == getattr(energy, name)
    assert not found.training and not any(p.requires_grad for p in found.parameters())


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        ImageEnergy.from_pretrained(tmp_path)
    with pytest.raises(TypeError, match="Quadratic has no config"):
        ImageEnergy(Quadratic(1.0), langevin_steps=1, step_size=0.1).save_pretrained(tmp_path)
    an_energy().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"class": "density"}, "is not that of an image energy"),
        ({"format": 99}, "of format 1"),
        ({"langevin_steps": 0}, "langevin_steps must be at least 1"),
        ({"network": {"kind": "none"}}, "KeyError"),
        ({"network": config["network"] | {"channels": [4, 8]}}, "do not fit its config.json"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            ImageEnergy.from_pretrained(tmp_path)


def test_another_vae_or_prior():
    vae, prior = linear_vae(), tilted_prior(0.5, StandardNormal(2).double())
    energy = ImageEnergy(Linear(), langevin_steps=1, step_size=0.1)
    energy.record = fingerprints(vae, prior)
    draw_with_energy(vae, prior, energy, 2, proposals=2)
    draw_with_energy(prior.under(vae), prior, energy, 2, proposals=2)
    mixture = GaussianMixture(2, 2).double()
    for other in (None, tilted_prior(0.5, mixture)):
        with pytest.raises(ValueError, match="fitted on another prior"):
            draw_with_energy(vae, other, energy, 2, proposals=2)
    moved = linear_vae()
    moved.decoder.c.data += 0.1
    with pytest.raises(ValueError, match="fitted on another VAE"):
        draw_with_energy(moved, prior, energy, 2, proposals=2)


@pytest.mark.parametrize("setting", [{"langevin_steps": 0}, {"step_size": 0.0}])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        ImageEnergy(Linear(), **({"langevin_steps": 2, "step_size": 0.1} | setting))


@pytest.mark.parametrize("likelihood", ["bernoulli", "categorical"])
def test_pixel_noise_needs_a_gaussian_decoder(likelihood, rng):
    vae = build_vae(SHAPE, latent_size=3, hidden=(8,), likelihood=likelihood).eval()
    with pytest.raises(ValueError, match=r"pixel_noise needs a decoder .* pixel_noise = False"):
        Joint(vae)
    joint = Joint(vae, pixel_noise=False)  # an energy of the means
    z = torch.randn(4, 3, generator=rng)
    images, log_p, _ = joint.decode(z)
    torch.testing.assert_close(images, vae.emit(vae.advance(vae.start(4), z)).mean)
    torch.testing.assert_close(log_p, -0.5 * z.square().sum(1))


def test_noise_and_latents_are_inverse(rng):
    """Of NVAE too, whose priors vary with the groups before them and whose values are 2x - 1."""
    vae = build_vae((1, 16, 16), preset="nvae-tiny", likelihood="normal", padding=0).eval()
    joint = Joint(vae)
    noise = torch.randn(3, joint.size, generator=rng)
    with torch.no_grad():
        images, log_p, latents = joint.decode(noise)
        expected = noise[:, : -joint.num_pixels]
        torch.testing.assert_close(joint.latent_noise(latents), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(log_p, -0.5 * noise.square().sum(1))
    assert images.shape == (3, 1, 16, 16)


def test_prior_without_gradient():
    class Blind(StandardNormal):
        def rows(self, num):
            from ncprior.walk import Repeated

            return Repeated(self, num)

        def log_prob(self, value):
            return super().log_prob(value.detach())

    energy = ImageEnergy(Linear(), langevin_steps=1, step_size=0.1)
    with pytest.raises(ValueError, match="log-density with a gradient"):
        draw_with_energy(linear_vae().with_prior(Blind(2).double()), None, energy, 2)
