"""Priors by name: fitted, kept and taken up again."""

import math

import numpy as np
import pytest
import torch
from compared import SMALL_FIT, options
from toys import gaussian_images, linear_vae

import ncprior
from ncprior import candidates
from ncprior.candidates import Candidates, is_known, load_fitted
from ncprior.comparison import compare
from ncprior.data import random_splits
from ncprior.priors.mixture import SIZES
from ncprior.ratios import MatchedRatio, ReencodedRatio
from ncprior.training import combining
from ncprior.training.presets import PRESETS


@pytest.fixture
def data(rng):
    return ncprior.ImageDataset(gaussian_images(500, rng))


@pytest.fixture
def splits():
    return random_splits(500, 50, 120, seed=0)


def test_mixtures_of_any_size(data, splits, tmp_path):
    names = ["mixture-1", "mixture-auto", "ncp-mixture-3"]
    fewer = options(priors=names, seeds=1, metrics=["fd"], samples=40, directory=tmp_path)
    compare(linear_vae(), data, splits, **fewer)
    one, auto, on_three = (load_fitted(tmp_path, name, 0, linear_vae())[0] for name in names)
    assert len(one.means) == 1 and len(auto.means) in SIZES
    assert len(on_three.base.means) == 3


def test_reencoded_ratios_on_any_base(data, splits, tmp_path):
    names = ["gaussian", "ncp-reencoded", "ncp-reencoded-mixture-3"]
    few = options(priors=names, seeds=1, metrics=["fd"], samples=40, directory=tmp_path)
    vae = linear_vae()
    once = compare(vae, data, splits, **few)
    plain, on_three = (load_fitted(tmp_path, name, 0, vae)[0] for name in names[1:])
    z = torch.zeros(3, 2)
    for prior in (plain, on_three):
        assert isinstance(prior.ratios[0], MatchedRatio | ReencodedRatio)
        assert torch.isfinite(prior.log_ratio(0, z)).all()  # it knows its VAE
    assert len(on_three.base.means) == 3
    again = compare(vae, data, splits, **few, resume=True)
    assert [s.values["fd"] for s in again.scores] == [s.values["fd"] for s in once.scores]
    assert not is_known("ncp-reencoded-") and not is_known("reencoded")


def test_combined_priors(data, splits, tmp_path, monkeypatch):
    """Of priors that are compared and of one that is not; their fits count in its seconds."""
    monkeypatch.setattr(combining, "DRAWS", 2000)
    monkeypatch.setattr(combining, "LOG_Z_DRAWS", 2000)
    both = "mixture-2+ncp-reencoded-mixture-3"
    few = options(priors=["mixture-2", both], seeds=1, samples=40, directory=tmp_path)
    vae = linear_vae()
    once = {s.prior: s.values for s in compare(vae, data, splits, **few).scores}
    assert once.keys() == {"mixture-2", both} and "nll" in once[both]
    _, seconds = load_fitted(tmp_path, "ncp-reencoded-mixture-3", 0, vae)
    known, of_both = load_fitted(tmp_path, both, 0, vae)
    assert of_both > seconds + load_fitted(tmp_path, "mixture-2", 0, vae)[1]
    assert [p["name"] for p in known.record["combined"]] == both.split("+")
    assert known.record["heldout_images"] == len(splits.validation)
    again = {s.prior: s.values for s in compare(vae, data, splits, **few, resume=True).scores}
    assert again[both]["fd"] == once[both]["fd"] and again[both]["nll"] == once[both]["nll"]
    assert is_known("ncp+mixture") and not is_known("ncp+energy")
    assert not is_known("ncp+")


@pytest.fixture
def fits(monkeypatch):
    """The names of priors that are fitted, in turn."""
    found = []
    of_ratio, of_density = candidates.fit_prior, candidates.fit_density

    def fit_prior(*args, **rest):
        found.append("ncp")
        return of_ratio(*args, **rest)

    def fit_density(name, *args, **rest):
        found.append(name)
        return of_density(name, *args, **rest)

    monkeypatch.setattr(candidates, "fit_prior", fit_prior)
    monkeypatch.setattr(candidates, "fit_density", fit_density)
    return found


def test_kept_priors_are_not_fitted_again(data, splits, tmp_path, fits):
    once = compare(linear_vae(), data, splits, directory=tmp_path, **options(seeds=1))
    fits.clear()
    again = compare(linear_vae(), data, splits, directory=tmp_path, resume=True, **options(seeds=1))
    assert not fits
    timed = ("fit_seconds", "seconds_per_1000")
    for a, b in zip(once.scores, again.scores, strict=True):
        for name in a.values.keys() - set(timed):
            assert a.values[name] == pytest.approx(b.values[name], rel=1e-5), name
        assert a.values["fit_seconds"] == b.values["fit_seconds"]
    other = linear_vae()  # whose priors these are not
    other.decoder.layer.bias.data += 0.01
    compare(other, data, splits, directory=tmp_path, resume=True, **options(seeds=1))
    assert fits == ["gaussian", "mixture", "ncp"]


def test_other_settings_of_ratios_cost_ratios_alone(data, splits, tmp_path, fits, monkeypatch):
    """Given or a preset's: what they are by default may differ from one version to the next."""
    asked = options(seeds=1, metrics=["fd"], samples=40, directory=tmp_path, resume=True)
    vae = linear_vae()
    compare(vae, data, splits, **asked)
    scored = (tmp_path / "mixture-0" / "scores.json").read_text()
    fits.clear()
    compare(vae, data, splits, **asked | {"fit": SMALL_FIT | {"learning_rate": 1e-3}})
    assert fits == ["ncp"]
    compare(vae, data, splits, **asked)
    assert fits == ["ncp"] * 2
    monkeypatch.setitem(PRESETS, "small", PRESETS["small"] | {"weight_decay": 0.5})
    compare(vae, data, splits, **asked)
    assert fits == ["ncp"] * 3
    assert load_fitted(tmp_path, "ncp", 0, vae)[0].record["settings"]["weight_decay"] == 0.5
    assert (tmp_path / "mixture-0" / "scores.json").read_text() == scored


def test_settings_by_name(data, splits):
    """Those that a fit records, by the kind of base and of ratio; of a mean those of its parts."""
    rest = {"directory": None, "resume": False, "progress": False}
    known = Candidates(linear_vae(), data, splits, fit=SMALL_FIT, **rest)
    (fitted, _), *_ = known.fitted(["ncp-mixture-2"], 0).values()
    own = known.settings("ncp-mixture-2")
    assert own["base"] == "mixture-2"
    assert {name: own[name] for name in fitted.record["settings"]} == fitted.record["settings"]
    assert known.settings("ncp-multistage")["batch_size"] == PRESETS["stages"]["batch_size"]
    assert known.settings("mixture-3")["components"] == 3 and "report" not in own
    assert known.settings("flow")["transforms"] == 6
    assert known.settings("flow+ncp") == {name: known.settings(name) for name in ("flow", "ncp")}


def test_settings_that_say_the_same(data, splits):
    """What is spelt out and what is left to the default, or changes no fit, are one."""
    rest = {"directory": None, "resume": False, "progress": False}
    same = [{}, {"preset": "small"}, {"patience": 10}, {"tensorboard": False}, {"heldout": None}]
    found = [
        Candidates(linear_vae(), data, splits, fit=fit, **rest).settings("ncp")
        for fit in (*same, {"patience": 11})
    ]
    assert all(settings == found[0] for settings in found[:-1]) and found[-1] != found[0]


def test_settings_of_any_kind(data, splits):
    """A base that is no name, and numbers of numpy; fitted with both as they are."""
    fit = SMALL_FIT | {"base": ncprior.GaussianMixture(2, 2), "steps": np.int64(30)}
    found = compare(linear_vae(), data, splits, **options(seeds=1, priors=["ncp"], fit=fit))
    assert math.isfinite(found.scores[0].values["fd"])


def test_other_images_are_fitted_anew(data, splits, tmp_path, fits):
    asked = options(seeds=1, metrics=["fd"], samples=40, directory=tmp_path, resume=True)
    compare(linear_vae(), data, splits, **asked)
    once = (tmp_path / "mixture-0" / "scores.json").read_text()
    fits.clear()
    compare(linear_vae(), data, random_splits(500, 50, 120, seed=1), **asked)
    assert fits == ["gaussian", "mixture", "ncp"]
    assert (tmp_path / "mixture-0" / "scores.json").read_text() != once


def test_scores_go_with_the_prior_that_they_are_of(data, splits, tmp_path, monkeypatch):
    """A fit in the place of another, stopped before it is measured."""
    asked = options(seeds=1, metrics=["fd"], samples=40, directory=tmp_path)
    compare(linear_vae(), data, splits, **asked)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped, pytest.raises(KeyboardInterrupt):
        stopped.setattr("ncprior.comparison.quality_figures", stop)
        compare(linear_vae(), data, splits, **asked)
    assert (tmp_path / "mixture-0" / "fit.json").exists()
    assert not (tmp_path / "mixture-0" / "scores.json").exists()
