import math

import pytest
import torch

import ncprior
from ncprior.data import Splits
from ncprior.feature_training import train_features
from ncprior.generation import Draws
from ncprior.metrics import frechet_distance, load_features, moment_blocks
from ncprior.numerics import jackknife
from ncprior.quality_figures import METRICS, frechet_figures, quality_figures


def gap_closed(*blocks):
    """Of base, NCP and reconstruction, against the last, straight from the definition."""
    base, ncp, best = (frechet_distance(part, blocks[-1]) for part in blocks[:-1])
    return (base - ncp) / (base - best)


@pytest.fixture(scope="module")
def judge(digits, tmp_path_factory):
    """A classifier of the digits."""
    directory = tmp_path_factory.mktemp("digits")
    options = {"epochs": 6, "device": "cpu", "progress": False}
    train_features(*digits, directory=directory, **options)
    return directory


@pytest.fixture(scope="module")
def halves(digits):
    """The digits with as many test as training images, so that samples can be of their law."""
    data, _ = digits
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    return data, Splits(*order.split([640, 57, 1100])), order


@pytest.fixture(scope="module")
def three(halves):
    """Samples: noisy images as base, real ones as ncp and as reconstruction."""
    data, splits, _ = halves
    images = data.raw(splits.test[:500])
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(1))
    return {
        "base": 0.6 * images + 0.4 * noise,
        "ncp": 0.8 * images + 0.2 * noise,
        "reconstruction": images,
    }


def test_all_metrics_at_once(three, halves, judge):
    data, splits, _ = halves
    found = quality_figures(three, data, splits, metrics=METRICS, features=judge, seed=3)
    kinds = ("fd", "fd_infinity", "kid", "precision", "recall", "density", "coverage")
    kinds += ("near_train", "closer_to_train", "modes_tv", "rarest_class")
    assert set(found) == {f"{kind}_{name}" for kind in kinds for name in three} | {
        "gap_closed",
        "fd_gain_over_base",
    }
    checksum = load_features(judge).checksum[:8]
    for name, figure in found.items():
        assert math.isfinite(figure.value) and figure.error() and figure.seed == 3, name
        named = figure.unit + figure.note
        if not name.startswith(("near", "closer", "gap", "rarest")):
            assert f"digits {checksum}" in named, name
    for kind in ("fd", "kid"):
        assert found[f"{kind}_base"].value > found[f"{kind}_ncp"].value
    assert found["precision_reconstruction"].value > found["precision_base"].value + 0.1


def test_draws_or_their_images_under_any_names(three, halves):
    data, splits, _ = halves
    draws = {"anything": Draws(three["ncp"], [], torch.empty(0))}
    a = quality_figures(draws, data, splits)
    b = quality_figures({"anything": three["ncp"]}, data, splits)
    assert a == b and set(a) == {"fd_anything"}


def test_gap_and_its_error_are_those_of_the_jackknife_of_four_sets(three, halves):
    data, splits, _ = halves
    found = frechet_figures(three, data, splits)["gap_closed"]
    sets = [moment_blocks(part.flatten(1)) for part in three.values()]
    against = moment_blocks(data.raw(splits.test).flatten(1))
    expected = jackknife(gap_closed, *sets, against)
    # Some pixels are always black: roots of eigenvalues that should be 0 are off by 1e-8 and more.
    assert (found.value, found.se) == pytest.approx(tuple(expected), rel=1e-5)


def test_what_is_won_over_another_base_than_the_prior_of_the_vae(three, halves):
    """FD base less FD ncp with the error of the pair, and gaps from the VAE's own prior."""
    data, splits, _ = halves
    four = {"vae_prior": 0.5 * three["base"] + 0.2} | three
    found = frechet_figures(four, data, splits)
    sets = {name: moment_blocks(part.flatten(1)) for name, part in four.items()}
    against = moment_blocks(data.raw(splits.test).flatten(1))
    best = sets["reconstruction"]

    def won(base, ncp, reference):
        return frechet_distance(base, reference) - frechet_distance(ncp, reference)

    expected = {
        "fd_gain_over_base": jackknife(won, sets["base"], sets["ncp"], against),
        "gap_closed": jackknife(gap_closed, sets["vae_prior"], sets["ncp"], best, against),
        "gap_closed_base": jackknife(gap_closed, sets["vae_prior"], sets["base"], best, against),
    }
    for name, (value, se) in expected.items():
        assert (found[name].value, found[name].se) == pytest.approx((value, se), rel=1e-4)


class Dropping:
    """Samples from real images, of one class only one in `keep`."""

    def __init__(self, data, rows):
        self.data, self.rows = data, rows

    def __call__(self, dropped, keep):
        own = self.data.labels[self.rows] == dropped
        order = own.cumsum(0) % keep == 0 if keep else torch.zeros_like(own)
        return self.data.raw(self.rows[~own | order])


def test_a_prior_that_drops_a_class_is_seen(halves, judge):
    """Sharper than the base but without most threes: distance says better, modes say why not."""
    data, splits, order = halves
    sampler = Dropping(data, order[:700])
    base = sampler(3, 1)
    blurred = torch.nn.functional.avg_pool2d(base, 3, 1, 1)
    draws = {"base": 0.5 * base + 0.5 * blurred, "ncp": sampler(3, 0), "fair": base}
    found = quality_figures(
        draws, data, splits, metrics=["fd", "modes"], features="pixels", classifier=judge
    )
    assert found["fd_ncp"].value < found["fd_base"].value
    rarest = found["rarest_class_ncp"]
    assert "class 3:" in rarest.note and rarest.interval[1] < 0.5
    assert found["rarest_class_fair"].interval[1] > 0.9
    tv = found["modes_tv_ncp"]
    assert tv.value > found["modes_tv_fair"].value + 2 * tv.se
    # A tenth is dropped, so total variation is about that; chance adds to it.
    assert tv.value == pytest.approx(0.1, abs=4 * tv.se)


def test_copies_of_training_images_are_seen(halves):
    data, splits, order = halves
    copies = data.raw(splits.train[:300])
    fresh = data.raw(order[640:697])
    found = quality_figures({"a": copies, "b": fresh}, data, splits, metrics=["near"])
    assert found["near_train_a"].value == 1 and found["closer_to_train_a"].value > 0.9
    assert found["near_train_b"].value < 0.05 + 4 * found["near_train_b"].se
    assert abs(found["closer_to_train_b"].value - 0.5) < 4 * found["closer_to_train_b"].se


def test_too_few_images_are_said(three, halves):
    data, splits, _ = halves
    few = {"base": three["base"][:64], "ncp": three["ncp"][:65]}
    found = quality_figures(few, data, splits)
    assert "fewer than the 64 features: far too large" in found["fd_base"].note
    assert "fewer" not in found["fd_ncp"].note


def test_values_that_stick_out_are_cut_off(three, halves):
    data, splits, _ = halves
    wide = 1.3 * three["ncp"]
    found = quality_figures({"a": wide}, data, splits)
    assert found == quality_figures({"a": wide.clamp(0, 1)}, data, splits)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        (torch.rand(50, 1, 8, 9), {}, "images of a must be 1x8x8 as those of digits, got 1x8x9"),
        (torch.rand(50, 1, 8, 8) * 255, {}, r"images of a must lie in \[0, 1\].*different ranges"),
        (torch.rand(50, 1, 8, 8) * 2 - 1, {}, r"images of a must lie in \[0, 1\]"),
        (torch.full((50, 1, 8, 8), torch.nan), {}, r"must lie in \[0, 1\], got nan"),
        (torch.full((50, 1, 8, 8), 0.5), {}, "pixels of a must differ from image to image"),
        (torch.rand(50, 1, 8, 8), {"metrics": ["fid"]}, r"metrics must be some of fd, .*\['fid'\]"),
        (torch.rand(50, 1, 8, 8), {"metrics": []}, "metrics must be some of"),
        (torch.rand(50, 1, 8, 8), {"metrics": ["modes"]}, "modes need a classifier, and pixels"),
    ],
)
def test_bad_input(images, options, message, halves):
    data, splits, _ = halves
    with pytest.raises(ValueError, match=message):
        quality_figures({"a": images}, data, splits, **options)


class Broken(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1).log()  # of black pixels, minus infinity


def test_features_that_are_not_finite(halves):
    data, splits, _ = halves
    with pytest.raises(ValueError, match="features Broken of the test images must be finite"):
        quality_figures({"a": torch.rand(50, 1, 8, 8)}, data, splits, features=Broken())


def test_a_classifier_of_other_images_is_refused(halves, judge):
    """Labels say that it knows nothing of them."""
    data, splits, _ = halves
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    other = ncprior.ImageDataset(data.images, labels=order[data.labels], name="other")
    with pytest.raises(ValueError, match="must know the classes of other, but is right on"):
        quality_figures(
            {"a": torch.rand(50, 1, 8, 8)}, other, splits, metrics=["modes"], features=judge
        )
