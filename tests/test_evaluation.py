import math

import pytest
import torch
from toys import ExactFlat, gaussian_images, linear_vae, standard_normal

import ncprior
from ncprior import evaluation, sources
from ncprior.data import random_splits
from ncprior.evaluation import draw_each
from ncprior.nll_figures import nll_figures
from ncprior.priors import GaussianMixture
from ncprior.quality_figures import frechet_figures
from ncprior.sources import Kept, Source, training_images


class Double(ExactFlat):
    """`ExactFlat` that reads the single precision of data sets."""

    def encode(self, images):
        return super().encode(images.double())


class Tilt(torch.nn.Module):
    def forward(self, z, context=None):
        return 0.4 * z.sum(-1)


def tilted():
    return ncprior.NoiseContrastivePrior([Tilt()], standard_normal(2))


@pytest.fixture
def data(rng):
    return ncprior.ImageDataset(gaussian_images(500, rng))


@pytest.fixture
def splits():
    return random_splits(500, 50, 120, seed=0)


def test_nll_of_a_known_model(data, splits):
    """The base's exactly; the NCP's, N(0.4, I), within the error of its weights and log Z."""
    vae = Double(sigma=0.05, c=0.1)
    found = nll_figures(vae, data, splits, tilted(), images=100, log_z_draws=20_000)
    x = data.raw(splits.test[:100]).double()
    base = -vae.log_evidence(x)
    assert found["nll_base"].value == pytest.approx(float(base.mean()), abs=1e-5)
    assert found["nll_base"].se == pytest.approx(float(base.std()) / 10, rel=1e-4)

    shifted = torch.distributions.Normal(0.5 + 0.1 * 0.4, vae.spread)
    ncp = -shifted.log_prob(x).flatten(1).sum(1)
    log_z = found["nll_log_z"]
    assert abs(log_z.value - 0.4**2) < 4 * log_z.se
    # 200 weights exp(0.4 z) an image, of variance about 2 * 0.16 * 0.2; averaged over 100 images.
    error = 4 * math.sqrt(log_z.se**2 + 0.064 / 200 / 100) + 0.064 / 400
    assert abs(found["nll_ncp"].value - float(ncp.mean())) < error
    gain = found["nll_base"].value - found["nll_ncp"].value
    assert found["nll_gain"].value == pytest.approx(gain, abs=1e-9)
    assert found["nll_ncp"].se > log_z.se


def test_same_seed_same_figures(data, splits):
    options = {"images": 20, "importance_samples": 3, "log_z_draws": 100}
    a, b, c = (nll_figures(Double(), data, splits, tilted(), seed=s, **options) for s in (0, 0, 1))
    assert a == b and a["nll_ncp"].value != c["nll_ncp"].value


def test_frechet_figures_of_the_data_themselves(data, splits):
    """A perfect prior closes the gap; all distances name their space and their counts."""
    vae = Double(sigma=0.01, c=0.08)
    drawn = draw_each(vae, tilted(), data, splits, 400, proposals=50)
    found = frechet_figures(drawn, data, splits)
    gains = {"gap_closed", "fd_gain_over_base"}
    assert set(found) == {"fd_base", "fd_ncp", "fd_reconstruction"} | gains
    # The base is right and the tilt moves it by 0.4 * 0.08 per pixel.
    assert found["fd_ncp"].value == pytest.approx(2 * 0.032**2, abs=4 * found["fd_ncp"].se + 3e-4)
    assert found["fd_base"].value < 4 * found["fd_base"].se + 3e-4
    assert "pixels" in found["fd_ncp"].unit and found["fd_ncp"].samples == 400


def test_training_images_are_as_the_encoder_reads_them(binary_digits):
    data, splits = binary_digits
    images = training_images(data, splits, seed=0)
    assert len(images) == len(splits.train) and images.unique().tolist() == [0, 1]
    assert torch.equal(images, training_images(data, splits, seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["fid"]}, "metrics must be some of nll, fd, .*, got fid"),
        ({"metrics": []}, "metrics must be some of"),
        ({"priors": {"base": None}}, "priors must have other names than base"),
        ({"priors": {"vae_prior": None}}, "priors must have other names than vae_prior"),
        ({"metrics": ["nll"], "images": 1}, "images and log_z_draws must be at least 2"),
        ({"metrics": ["fd"], "samples": 10}, "samples must be at least 40"),
    ],
)
def test_arguments(options, message, data, splits):
    with pytest.raises(ValueError, match=message):
        ncprior.evaluate(Double(), tilted(), data, splits, **options)


UNMEASURABLE = [
    ({"features": "incepton"}, "features must be pixels, .*got 'incepton'"),
    ({"features": "mnist"}, "images must be 1x28x28 for the features mnist"),
    ({"metrics": ["nll", "modes"]}, "modes need a classifier, and pixels tells no classes"),
]


@pytest.mark.parametrize(("options", "message"), UNMEASURABLE)
def test_what_cannot_be_measured_is_not_drawn(options, message, data, splits, monkeypatch):
    monkeypatch.setattr(sources, "draw", None)
    monkeypatch.setattr(evaluation, "measure_nll", None)
    with pytest.raises(ValueError, match=message):
        ncprior.evaluate(Double(), tilted(), data, splits, **options)


OPTIONS = {"samples": 60, "proposals": 10, "images": 5, "log_z_draws": 100}


def test_evaluate_measures_both(data, splits):
    found = ncprior.evaluate(Double(), tilted(), data, splits, **OPTIONS)
    assert {"nll_base", "nll_ncp", "nll_gain", "nll_log_z", "fd_base", "gap_closed"} <= set(found)


def test_gains_are_over_the_prior_of_the_vae_where_the_base_is_another(data, splits):
    """Against the same two measured apart: the VAE alone, and the VAE on that base."""
    vae, base = Double(sigma=0.05, c=0.1), GaussianMixture(1, 2).double()
    base.means.fill_(0.5)  # N(0.5, I)
    prior = ncprior.NoiseContrastivePrior([Tilt()], base)
    found = ncprior.evaluate(vae, prior, data, splits, **OPTIONS)
    own = ncprior.evaluate(vae, None, data, splits, **OPTIONS)
    moved = ncprior.evaluate(vae.with_prior(base), prior, data, splits, **OPTIONS)
    value = {name: figure.value for name, figure in found.items()}
    assert found["nll_vae_prior"].value == pytest.approx(own["nll_base"].value, abs=1e-9)
    assert found["fd_vae_prior"] == own["fd_base"]
    for name in ("nll_base", "nll_ncp", "fd_base", "fd_ncp"):
        assert found[name].value == pytest.approx(moved[name].value, abs=1e-9)
    assert value["nll_gain"] == pytest.approx(value["nll_vae_prior"] - value["nll_ncp"])
    assert value["nll_gain_base"] == pytest.approx(value["nll_vae_prior"] - value["nll_base"])
    assert found["nll_gain_over_base"].value == pytest.approx(moved["nll_gain"].value, abs=1e-9)
    whole = value["fd_vae_prior"] - value["fd_reconstruction"]
    for name, to in (("gap_closed", "ncp"), ("gap_closed_base", "base")):
        assert value[name] == pytest.approx((value["fd_vae_prior"] - value[f"fd_{to}"]) / whole)
    won = value["fd_base"] - value["fd_ncp"]
    assert value["fd_gain_over_base"] == pytest.approx(won)
    assert "FD vae prior - FD ncp" in found["gap_closed"].note
    assert "vae prior" in str(found) and not {"vae_prior", "gap_closed_base"} & set(moved)


def test_evaluate_a_vae_alone(data, splits):
    found = ncprior.evaluate(Double(), None, data, splits, **OPTIONS)
    assert {"nll_base", "fd_base", "fd_reconstruction"} <= set(found)
    assert not any(name.endswith("ncp") for name in found)


def test_further_priors_are_measured_on_the_same_draws(data, splits):
    """The base itself under another name: every figure of it is the same."""
    priors = {"twin": standard_normal(2)}
    found = ncprior.evaluate(Double(), tilted(), data, splits, priors=priors, **OPTIONS)
    assert found["nll_twin"].value == pytest.approx(found["nll_base"].value, abs=1e-9)
    assert found["fd_twin"] == found["fd_base"]
    header = next(line for line in str(found).splitlines() if "figure" in line)
    positions = [header.index(name) for name in ("base", "ncp", "twin", "reconstruction")]
    assert positions == sorted(positions)


class Stop(Exception):
    pass


def test_a_stopped_evaluation_goes_on(data, splits, tmp_path, monkeypatch):
    """Draws and finished figures are taken up; nothing is left behind at the end."""
    whole = ncprior.evaluate(Double(), tilted(), data, splits, **OPTIONS)
    options = OPTIONS | {"directory": tmp_path / "kept"}

    def stop(*_, **__):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "quality_figures", stop)
        with pytest.raises(Stop):
            ncprior.evaluate(Double(), tilted(), data, splits, **options)
    with monkeypatch.context() as patch:  # what was done is not done again
        patch.setattr(evaluation, "measure_nll", stop)
        patch.setattr(sources, "draw", stop)
        again = ncprior.evaluate(Double(), tilted(), data, splits, resume=True, **options)
    assert again == whole and not (tmp_path / "kept").exists()


def test_other_settings_are_not_taken_up(data, splits, tmp_path, monkeypatch):
    kept = Kept(tmp_path)
    source = Source(Double())
    first = kept.draws("base", source, 50, seed=0, progress=False)
    assert torch.equal(kept.draws("base", source, 50, seed=0, progress=False).images, first.images)
    other = kept.draws("base", source, 50, seed=1, progress=False)
    assert not torch.equal(other.images, first.images)
    narrow = kept.draws("base", source, 50, seed=0, progress=False, temperature=0.5)
    assert not torch.equal(narrow.images, first.images)


def test_parts_are_the_draws_of_one_call(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PART", 7)
    found = Kept(tmp_path).draws("ncp", Source(Double(), tilted()), 20, seed=3, progress=False)
    whole = ncprior.draw(Double(), tilted(), 20, seed=3)
    assert torch.equal(found.images, whole.images) and torch.equal(found.ess, whole.ess)


def test_test_images_that_a_prior_was_fitted_on(data, splits):
    vae = linear_vae()
    small = {"width": 4, "blocks": 1, "members": 1}
    options = {"steps": 5, "network_options": small, "log_z_draws": 100, "progress": False}
    counts = {"metrics": "fd", "samples": 40}
    mixture, some = GaussianMixture(2, 2), splits.validation
    elsewhere = ncprior.ImageDataset(1 - data.images)
    for rows, seen in ((splits.train, 0), (None, 120), (splits.test[:20], 20)):
        prior = ncprior.fit_prior(vae, data, rows=rows, **options)
        found = ncprior.evaluate(vae, prior, data, splits, **counts).warnings
        told = [text for text in found if "the prior was fitted on" in text]
        assert bool(told) == bool(seen)
        if seen:
            assert told[0].startswith(f"{seen} of the 120 test images")
            diagnosed = ncprior.diagnose(
                vae, data, splits, prior, samples=40, latent_metrics=()
            ).warnings
            assert told[0] in diagnosed
        others = {"mine": prior, "both": ncprior.combine(vae, [prior, mixture], data, rows=some)}
        for other in others.values():
            found = ncprior.evaluate(vae, None, data, splits, priors={"x": other}, **counts)
            assert bool(found.warnings) == bool(seen)
        assert not ncprior.evaluate(vae, prior, elsewhere, splits, **counts).warnings


def test_a_prior_of_another_vae(data, splits):
    vae, other = linear_vae(), linear_vae(mean=0.7)
    small = {"width": 4, "blocks": 1, "members": 1}
    prior = ncprior.fit_prior(
        vae, data, steps=5, network_options=small, log_z_draws=100, base="mixture", progress=False
    )
    prior.check_fitted_on(prior.under(vae))  # the same networks on another base
    for measure in (ncprior.evaluate, ncprior.diagnose):
        with pytest.raises(ValueError, match="fitted on another VAE"):
            measure(other, prior=prior, data=data, splits=splits, samples=40)
    with pytest.raises(ValueError, match="fitted on another VAE"):
        ncprior.evaluate(other, None, data, splits, priors={"x": prior}, samples=40)
