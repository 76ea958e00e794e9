"""What is said of latents that collapsed, posteriors far away, and classifiers that over-fit."""

import math

import pytest
import torch
from toys import gaussian_images, linear_vae

import ncprior
from ncprior.training.verdict import histogram, warnings

OPTIONS = {
    "tensorboard": False,
    "progress": False,
    "device": "cpu",
    "steps": 60,
    "evaluate_every": 20,
    "log_z_draws": 20_000,
    "network_options": {"width": 16, "members": 4},
}


def fitted(rng, **encoder):
    return ncprior.fit_prior(linear_vae(**encoder), gaussian_images(3000, rng), **OPTIONS)


def test_collapsed_latents(rng):
    """Posteriors that are the prior: no hole. The JSD's own error is about 1 / sqrt(n) / 4."""
    prior = fitted(rng, mean=0.0, spread=1.0, noise=1.0)
    (group,) = prior.record["groups"]
    assert group["kl"] == pytest.approx(0, abs=1e-6)
    assert group["jsd"] == pytest.approx(0, abs=0.01)
    assert abs(prior.log_z.value) < 4 * prior.log_z.se + 0.02
    assert len(group["warnings"]) == 1 and "latents have collapsed" in group["warnings"][0]


def test_separated_posterior(rng):
    prior = fitted(rng, mean=12.0, spread=0.6)
    (group,) = prior.record["groups"]
    assert group["jsd"] == pytest.approx(math.log(2), abs=0.01)
    assert len(group["warnings"]) == 1 and "separates almost perfectly" in group["warnings"][0]
    assert "base = mixture" in group["warnings"][0]


def test_without_calibration(rng):
    """The same network, whose logits are left as they are."""
    images, vae = gaussian_images(300, rng), linear_vae()
    plain, raw = (
        ncprior.fit_prior(vae, images, calibrate=wanted, match_moments=False, **OPTIONS).ratios[0]
        for wanted in (True, False)
    )
    assert (float(raw.temperature), float(raw.shift)) == (1.0, 0.0)
    assert float(plain.temperature) != 1.0
    z = torch.randn(9, 2, generator=rng)
    torch.testing.assert_close(plain.temperature * raw(z) + plain.shift, plain(z))


def test_healthy_posterior_has_no_warning(rng):
    assert fitted(rng).record["groups"][0]["warnings"] == []


HEALTHY = {"kl": 5.0, "jsd": 0.2, "loss": 1.0, "train_loss": 0.95}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, []),
        ({"kl": 0.001}, ["collapsed"]),
        ({"jsd": 0.69}, ["separates"]),
        ({"train_loss": 0.8}, ["over-fits"]),
        ({"train_loss": 0.8, "jsd": 0.69}, ["separates"]),  # one cause, one warning
        ({"kl": 0.001, "train_loss": 0.8}, ["collapsed", "over-fits"]),
    ],
)
def test_warnings(change, said):
    found = warnings(HEALTHY | change)
    assert len(found) == len(said)
    assert all(word in warning for word, warning in zip(said, found, strict=True))


def test_histogram_is_a_density(rng):
    a, b = torch.randn(2, 5000, generator=rng)
    found = histogram(a, b + 1, bins=20)
    edges = torch.tensor(found["edges"])
    assert len(edges) == 21
    for side in ("q", "p"):
        assert float((torch.tensor(found[side]) * edges.diff()).sum()) == pytest.approx(1, abs=1e-5)


def test_histogram_of_a_constant():
    found = histogram(torch.zeros(10), torch.zeros(10))
    assert all(map(math.isfinite, found["edges"] + found["q"] + found["p"]))
