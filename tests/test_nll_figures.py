import math

import pytest
import torch
from toys import ExactFlat, TwoGroups, gaussian_images, standard_normal

import ncprior
from ncprior.data import random_splits
from ncprior.nll_figures import measure_nll, nll_figures
from ncprior.nll_words import chosen_method, log_z_figure, log_z_warnings, pixels_said
from ncprior.normal import Normal
from ncprior.numerics import LogZ

SMALL = {"images": 60, "importance_samples": 50, "log_z_draws": 5000}
SMALL |= {"log_z_chains": 200, "log_z_temperatures": 10}


class Double(ExactFlat):
    """`ExactFlat` that reads the single precision of data sets."""

    def encode(self, images):
        return super().encode(images.double())


class Tilt(torch.nn.Module):
    def forward(self, z, context=None):
        return 0.4 * z.sum(-1)


class Black(torch.nn.Module):
    """Images to a posterior, or latents to logits: zeros of a wanted shape."""

    def __init__(self, *shape):
        super().__init__()
        self.shape = shape

    def forward(self, x):
        return x.new_zeros(len(x), *self.shape)


def tilted():
    return ncprior.NoiseContrastivePrior([Tilt()], standard_normal(2))


@pytest.fixture
def data(rng):
    return ncprior.ImageDataset(gaussian_images(300, rng))


@pytest.fixture
def splits():
    return random_splits(300, 50, 100, seed=0)


def test_every_prior_of_a_known_model(data, splits):
    """N(0.4, I) as an NCP and as a density: equal up to log Z, and known in closed form."""
    vae = Double(sigma=0.05, c=0.1)
    one = torch.ones(2, dtype=torch.float64)
    found = measure_nll(
        vae, data, splits, tilted(), others={"shifted": Normal(0.4 * one, one)}, **SMALL
    )
    figures = found.figures
    x = data.raw(splits.test[:60]).double()
    shifted = torch.distributions.Normal(0.5 + 0.1 * 0.4, vae.spread)
    exact = -shifted.log_prob(x).flatten(1).sum(1)
    # Weights exp(0.4 z) have the variance 2 * 0.16 * 0.2 within an image: 50 draws, 60 images.
    error = 4 * math.sqrt(0.064 / 50 / 60) + 0.064 / 100
    assert figures["nll_shifted"].value == pytest.approx(float(exact.mean()), abs=error)
    assert figures["nll_shifted"].se == pytest.approx(float(exact.std()) / 60**0.5, rel=0.1)

    z = figures["nll_log_z"]
    assert abs(z.value - 0.16) < 4 * z.se
    apart = figures["nll_ncp"].value - figures["nll_shifted"].value
    assert apart == pytest.approx(z.value - 0.16, abs=1e-6)
    assert figures["nll_ncp"].se == pytest.approx(math.hypot(figures["nll_shifted"].se, z.se))
    # Two pools of 1023: each adds sqrt((exp(2 * 0.16) - 1) / 1023) to the images that share it.
    pool = math.sqrt(math.expm1(0.32) / 1023) * math.hypot(50, 10) / 60
    assert figures["nll_snis"].value == pytest.approx(float(exact.mean()), abs=4 * pool + error)
    assert figures["nll_snis"].se == pytest.approx(
        math.hypot(figures["nll_shifted"].se, pool), rel=0.05
    )
    assert figures["nll_gain_shifted"].value == pytest.approx(
        figures["nll_base"].value - figures["nll_shifted"].value
    )
    assert found.warnings == []


def test_names_bits_and_notes(data, splits):
    figures = nll_figures(Double(), data, splits, tilted(), **SMALL)
    assert list(figures) == [
        *("nll_base", "bpd_base", "nll_ncp", "bpd_ncp", "nll_gain", "nll_snis", "bpd_snis"),
        *("nll_log_z", "log_z_base", "log_z_ais", "log_z_bridge"),
    ]
    for name in ("base", "ncp", "snis"):
        nats, bits = figures[f"nll_{name}"], figures[f"bpd_{name}"]
        assert bits.value == pytest.approx(nats.value / (2 * math.log(2)))
        assert bits.se == pytest.approx(nats.se / (2 * math.log(2)))
        assert bits.unit == "bits per dimension"
        assert "grey values, a density of pixels in [0, 1]" in nats.note
    assert "log Z by draws of the base" in figures["nll_ncp"].note
    assert "K = 1024" in figures["nll_snis"].note and "k-hat" in figures["log_z_ais"].note
    assert figures["nll_log_z"] == figures["log_z_base"]


def test_base_alone(data, splits):
    figures = nll_figures(Double(), data, splits, images=20, importance_samples=2)
    assert set(figures) == {"nll_base", "bpd_base"}


def test_posterior_draws_do_not_depend_on_the_prior(data, splits):
    options = SMALL | {"log_z_methods": ("base",), "snis_proposals": 0}
    alone = nll_figures(Double(), data, splits, **options)
    with_ncp = nll_figures(Double(), data, splits, tilted(), **options)
    assert alone["nll_base"].value == with_ncp["nll_base"].value
    assert "nll_snis" not in with_ncp and "log_z_ais" not in with_ncp


def test_two_groups(data, splits):
    """The NCP whose first group is moved to N(0.4, I): closed form, log Z by base draws alone."""

    class Groups(TwoGroups):
        def encode(self, images):
            return super().encode(images.double())

    vae = Groups(2)
    prior = ncprior.NoiseContrastivePrior([Tilt(), ncprior.ratios.UnitRatio()])
    found = measure_nll(vae, data, splits, prior, **SMALL)
    figures, x = found.figures, data.raw(splits.test[:60]).double()
    slope = (vae.c * vae.b + vae.e).item()
    spread = math.hypot(slope, vae._noise_of_z1().item())
    mean = torch.distributions.Normal(0.5 + slope * 0.4, spread)
    exact = -mean.log_prob(x).flatten(1).sum(1)
    error = 4 * math.hypot(figures["nll_log_z"].se, math.sqrt(math.expm1(0.32) / 50 / 60)) + 4e-3
    assert figures["nll_ncp"].value == pytest.approx(float(exact.mean()), abs=error)
    assert {"log_z_base"} == {name for name in figures if name.startswith("log_z")}
    assert "nll_snis" in figures


def log_z_of(k_hat, value=1.0, se=0.01):
    return LogZ(value, se, 100.0, 1000, k_hat)


@pytest.mark.parametrize(
    ("k_hats", "chosen"),
    [
        ({"base": 0.3, "ais": 0.1, "bridge": 0.1}, "base"),
        ({"base": None, "bridge": 0.1}, "base"),
        ({"base": 0.8, "ais": 0.1, "bridge": 0.1}, "bridge"),
        ({"base": 0.8, "ais": 0.1}, "ais"),
        ({"base": 0.8}, "base"),
        ({"base": 1.2, "ais": 0.9, "bridge": 0.9}, "bridge"),
    ],
)
def test_which_log_z_is_used(k_hats, chosen):
    assert chosen_method({name: log_z_of(k) for name, k in k_hats.items()}) == chosen


def test_words_on_log_z():
    assert log_z_warnings({"base": log_z_of(0.5), "bridge": log_z_of(None)}) == []
    (doubtful,) = log_z_warnings({"base": log_z_of(0.8)})
    assert "is doubtful" in doubtful and '"ais" and "bridge"' in doubtful
    (unreliable,) = log_z_warnings({"ais": log_z_of(1.1)})
    assert "is not reliable" in unreliable and "(k-hat 1.10" in unreliable
    (apart,) = log_z_warnings({"base": log_z_of(0.1), "bridge": log_z_of(0.1, value=1.06)})
    assert "1.000 by draws of the base and 1.060 by bridge sampling" in apart
    assert "k-hat 1.10, not reliable" in log_z_figure(log_z_of(1.1), 0, "ais").note
    assert log_z_figure(log_z_of(0.8), 0, "base").note.endswith("k-hat 0.80, doubtful")


def test_words_on_pixels(rng):
    bytes_ = torch.randint(0, 256, (4, 1, 2, 2), dtype=torch.uint8, generator=rng)
    dynamic, fixed, grey = (
        ncprior.ImageDataset(bytes_, binarize=how) for how in ("dynamic", 7, None)
    )
    assert pixels_said(dynamic, True, 3) == (
        "dynamic binarisation: each test image drawn once, by seed 3"
    )
    assert pixels_said(fixed, True, 3) == "binarised once, by the fixed seed 7"
    assert pixels_said(grey, False, 3) == "grey values"
    assert "static binarisation" in pixels_said(grey, True, 3)
    flipped = ncprior.ImageDataset(bytes_, flip=True)
    assert pixels_said(flipped, False, 3) == "grey values, mirrored at random"


@pytest.mark.parametrize("grey", [False, True])
def test_grey_values_under_a_bernoulli_are_called_so(grey, rng):
    """The logits are 0, so that every pixel costs log 2."""
    images = torch.rand(40, 1, 2, 2, generator=rng)
    data = ncprior.ImageDataset(images if grey else images.round())
    vae = ncprior.FlatVAE(Black(6), Black(1, 2, 2), ncprior.vaes.Bernoulli(), latent_size=3)
    found = measure_nll(vae, data, random_splits(40, 10, 10, seed=0), images=10)
    assert found.figures["bpd_base"].value == pytest.approx(1)
    said = "static binarisation" if not grey else "grey values"
    assert said in found.figures["nll_base"].note
    assert ["cross-entropies, not likelihoods" in w for w in found.warnings] == [True] * grey


def test_loose_bounds_are_called_so(data, splits):
    """A posterior far too narrow: few weights count, the bound is loose."""

    class Narrow(Double):
        def encode(self, images):
            loc, scale = super().encode(images)
            return loc, 0.2 * scale

    found = measure_nll(Narrow(), data, splits, images=20, importance_samples=400)
    assert len(found.warnings) == 1 and "Raise importance_samples" in found.warnings[0]
    assert "k-hat above 0.7 in" in found.figures["nll_base"].note


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 1}, "images and log_z_draws must be at least 2"),
        ({"snis_proposals": 1}, "snis_proposals must be at least 2, or 0"),
        ({"log_z_methods": ("base", "best")}, "log_z_methods must be of base, ais, bridge"),
    ],
)
def test_arguments(options, message, data, splits):
    with pytest.raises(ValueError, match=message):
        measure_nll(Double(), data, splits, tilted(), **options)


def test_a_misspelt_option(data, splits):
    with pytest.raises(TypeError, match="importance_sample"):
        nll_figures(Double(), data, splits, importance_sample=3)
