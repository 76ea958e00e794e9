import pytest
import torch
from toys import gaussian_images, linear_vae

import ncprior
from ncprior.diagnosis import verdict
from ncprior.figures import Figure

FIT = {"steps": 40, "evaluate_every": 20, "log_z_draws": 2000, "progress": False, "device": "cpu"}
FIT |= {"network_options": {"width": 8, "members": 2}}


@pytest.fixture(scope="module")
def diagnosed():
    """A VAE with a hole: q(z) = N(0.8, 0.6^2 I) under p = N(0, I)."""
    images, vae = gaussian_images(1500, torch.Generator().manual_seed(0)), linear_vae()
    prior = ncprior.fit_prior(vae, images, **FIT)
    return vae, images, prior, ncprior.diagnose(vae, images, prior=prior, samples=300, proposals=50)


def test_figures(diagnosed):
    _, _, prior, found = diagnosed
    figures, (group,) = found.figures, prior.record["groups"]
    assert figures["nce_loss"].value == group["loss"] and figures["jsd"].value == group["jsd"]
    assert figures["log_z"].value == prior.log_z.value and figures["log_z"].se == prior.log_z.se
    assert 1 / 50 <= figures["ess_share"].value <= 1
    assert figures["fd_base"].samples == 300
    for figure in figures.values():
        assert figure.unit and figure.samples and figure.error()


def test_prints_as_a_table_with_a_verdict(diagnosed):
    text = str(diagnosed[3])
    for word in ("nce loss", "jsd", "fd base", "gap closed", "ess share", "The prior has a"):
        assert word in text


def test_the_same_seed_says_the_same(diagnosed):
    vae, images, prior, found = diagnosed
    again = ncprior.diagnose(vae, images, prior=prior, samples=300, proposals=50)
    assert again.figures == found.figures


def test_langevin_has_no_pool(diagnosed):
    vae, images, prior, _ = diagnosed
    found = ncprior.diagnose(vae, images, prior=prior, samples=40, sampler="langevin")
    assert "ess_share" not in found.figures


def test_small_pools_are_warned_of(diagnosed):
    vae, images, prior, _ = diagnosed
    found = ncprior.diagnose(vae, images, prior=prior, samples=40, proposals=2)
    assert any("fewer than 3 effective proposals" in warning for warning in found.warnings)


def figures(jsd, base, reconstruction, closed):
    return {
        "jsd": Figure(jsd, "nats", 1, 0),
        "fd_base": Figure(base, "squared", 1, 0, 0.1),
        "fd_reconstruction": Figure(reconstruction, "squared", 1, 0, 0.1),
        "gap_closed": Figure(closed, "share", 1, 0, 0.05),
    }


@pytest.mark.parametrize(
    ("jsd", "base", "words"),
    [
        (0.001, 1.05, ["hardly any hole", "next to nothing to win"]),
        (0.05, 3.0, ["a small hole", "from 3.000 to 1.000", "closes 60 % (± 5)"]),
        (0.4, 3.0, ["a large hole", "JSD 0.400 of at most 0.693"]),
    ],
)
def test_verdict(jsd, base, words):
    found = verdict(figures(jsd, base, 1.0, 0.6))
    assert all(word in found for word in words)


def test_log_z_far_from_zero_is_warned_of(diagnosed):
    vae, images, prior, _ = diagnosed
    try:
        kept = prior.log_z
        prior.log_z = kept._replace(value=-3.0)
        found = ncprior.diagnose(vae, images, prior=prior, samples=40, proposals=20)
    finally:
        prior.log_z = kept
    assert any("log Z is -3.00, far from 0" in warning for warning in found.warnings)
