import math

import pytest
import torch
from compared import SMALL_FIT, options
from toys import TwoGroups, gaussian_images, linear_vae

import ncprior
from ncprior import candidates, comparison, generation
from ncprior.comparison import compare
from ncprior.data import random_splits
from ncprior.priors import DiffusionPrior
from ncprior.scoreboard import Comparison, Score, load_comparison, save_comparison


@pytest.fixture
def data(rng):
    return ncprior.ImageDataset(gaussian_images(500, rng))


@pytest.fixture
def splits():
    return random_splits(500, 50, 120, seed=0)


def test_better_priors_score_better(data, splits):
    """q(z) is N(0.8, 0.6^2): the mixture is nearly that, N(0, I) is not."""
    found = compare(linear_vae(), data, splits, **options())
    by = {(s.prior, s.seed): s.values for s in found.scores}
    for seed in (0, 1):
        base, mixture = by["gaussian", seed], by["mixture", seed]
        assert mixture["fd"] < base["fd"] and mixture["nll"] < base["nll"]
        assert base["gap_closed"] == 0 and mixture["gap_closed"] > 0.8
        assert by["ncp", seed]["fd"] < base["fd"]
    assert found.pictures.keys() == {"gaussian", "mixture", "ncp", "reconstruction"}
    text = str(found)
    assert "mixture" in text and "2 seeds" in text
    assert found.markdown().count("\n") == 5


def test_only_what_is_new_is_measured(data, splits, tmp_path, monkeypatch):
    """A second seed and a third prior cost themselves alone, and change no figure of the rest."""
    asked = options(priors=["gaussian", "mixture"], seeds=1, metrics=["nll", "fd"])
    once = compare(linear_vae(), data, splits, directory=tmp_path, **asked)
    drawn = []
    draws = comparison.Kept.draws

    def seen(self, name, source, num, *, seed, **rest):
        drawn.append((name, seed))
        return draws(self, name, source, num, seed=seed, **rest)

    monkeypatch.setattr(comparison.Kept, "draws", seen)
    more = asked | {"priors": ["gaussian", "mixture", "ncp"], "seeds": 2}
    again = compare(linear_vae(), data, splits, directory=tmp_path, resume=True, **more)
    of_first = {name for name, seed in drawn if seed == 0}
    assert of_first == {"ncp"}
    assert {name for name, seed in drawn if seed == 1} == {*more["priors"], "reconstruction"}
    for name, figure in once.figures.items():
        assert again.figures[name] == figure
    assert [*again.pictures] == [*more["priors"], "reconstruction"]
    for name, picture in once.pictures.items():
        assert torch.equal(again.pictures[name], picture)
    drawn.clear()
    compare(linear_vae(), data, splits, directory=tmp_path, resume=True, **more | {"samples": 210})
    assert {seed for _, seed in drawn} == {0, 1}  # asked for differently: measured anew


def scores(**values):
    return [
        Score(prior, seed, {"fd": value})
        for prior, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def cells(**values):
    return {row[0]: row[1] for row in Comparison(scores(**values), {}, {}).table()[1:]}


def test_the_best_is_marked_only_beyond_the_intervals():
    clear = cells(a=[1.0, 1.1, 1.05], b=[2.0, 2.1, 2.05])
    assert clear["a"].startswith("**") and not clear["b"].startswith("**")
    # Differences -1, 1, -0.3: nothing can be said.
    assert not any("**" in cell for cell in cells(a=[1.0, 2.0, 1.0], b=[2.0, 1.0, 1.3]).values())
    # Paired: each seed moves both, the difference is always 0.1.
    paired = cells(a=[1.0, 5.0, 3.0], b=[1.1, 5.11, 3.1])
    assert paired["a"].startswith("**")
    found = Comparison(scores(a=[1.0, 1.1, 0.9], b=[2.0, 2.1, 1.9]), {}, {})
    assert "1.00 ± 0.25*" in str(found) and "**" not in str(found) and "Marked *:" in str(found)
    styled = found.text(styled=True)
    assert "\x1b[1m1.00 ± 0.25\x1b[0m" in styled and "*" not in styled and "Bold:" in styled
    assert "paired by seed" in styled and "wide intervals" not in styled
    assert "very wide intervals (t=12.7)" in Comparison(scores(a=[1.0, 1.1]), {}, {}).legend()
    assert not any("**" in cell for cell in cells(a=[1.0], b=[2.0]).values())


def test_intervals_are_students(tmp_path):
    """Of 1, 2, 3: sd 1, so half a 95 % interval is 4.303 / sqrt(3)."""
    cell = cells(a=[1.0, 2.0, 3.0])["a"]
    assert cell == f"2.0 ± {4.303 / math.sqrt(3):.1f}"
    found = Comparison(scores(a=[1.0, 2.0]), {}, {})
    save_comparison(found, tmp_path)
    assert load_comparison(tmp_path).scores == found.scores


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"priors": ["gaussian", "flew"]}, r"got flew \(did you mean 'flow'\?\)"),
        ({"priors": ["ncp-gaussian"]}, "priors must be some of .*, got ncp-gaussian"),
        ({"priors": ["ncp-mixture-0"]}, "priors must be some of .*, got ncp-mixture-0"),
        ({"priors": []}, "priors must be some of .*, got none"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"samples": 10}, "samples at least 40"),
        ({"fit": {"device": "tpu"}}, "device must be auto or cpu"),
    ],
)
def test_arguments(changes, message, data, splits):
    with pytest.raises(ValueError, match=message):
        compare(linear_vae(), data, splits, **options(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "incepton"}, "got 'incepton'"),
        ({"metrics": ["nll", "fid"]}, "metrics must be some of nll, fd, .*, got fid"),
        ({"metrics": ["modes"]}, "modes need a classifier"),
        ({"fit": {"preset": "huge"}}, "preset must be one of small, .*, got 'huge'"),
        ({"fit": {"steps": 0}}, "steps must be positive, got 0"),
    ],
)
def test_what_cannot_be_measured_is_not_fitted(changes, message, data, splits, monkeypatch):
    monkeypatch.setattr(candidates, "fit_density", None)
    with pytest.raises(ValueError, match=message):
        compare(linear_vae(), data, splits, **options(**changes))


def test_hierarchical_vaes_are_refused(data, splits):
    with pytest.raises(ValueError, match="one latent group, this one has 2"):
        compare(TwoGroups(), data, splits, **options())


def test_draws_together_are_those_of_any_batch():
    """A prior that is drawn in blocks gives the same draws whatever is asked for."""

    class Slow(torch.nn.Module):
        batch_shape, event_shape, draws_together = (), (2,), 16

        def sample(self, sample_shape=(), *, generator=None):
            return torch.randn(*sample_shape, 2, generator=generator)

        def log_prob(self, value):
            return value.sum(-1)

        def tempered(self, temperature):
            return self

    slow = linear_vae().with_prior(Slow())
    whole = ncprior.draw(slow, None, 50, seed=1).latents[0]
    assert torch.equal(ncprior.draw(slow, None, 50, seed=1, batch_size=7).latents[0], whole)
    assert torch.equal(ncprior.draw(slow, None, 9, seed=1, first=30).latents[0], whole[30:39])
    assert len(whole.unique(dim=0)) == 50


def test_a_slow_base_makes_a_slow_density():
    vae = linear_vae()
    (ratio,) = ncprior.fit_prior(vae, gaussian_images(100, torch.Generator()), **SMALL_FIT).ratios
    for base, slow in ((DiffusionPrior(2), True), (vae.prior, False)):
        assert comparison._is_slow(base) is slow
        assert comparison._is_slow(ncprior.NoiseContrastivePrior([ratio], base)) is slow


def test_slow_densities_are_left_out_unless_asked_for(data, splits, monkeypatch):
    """That of the diffusion prior is an equation to solve for each z."""
    fit = candidates.fit_density

    def short(name, codes, **settings):
        return fit(name, codes, **settings | ({"steps": 5} if name == "diffusion" else {}))

    monkeypatch.setattr(candidates, "fit_density", short)
    changes = options(priors=["gaussian", "diffusion"], seeds=1, metrics=["nll"], images=2)
    for asked in (False, True):
        found = compare(linear_vae(), data, splits, slow_nll=asked, **changes)
        scored = {score.prior for score in found.scores if "nll" in score.values}
        assert scored == ({"gaussian", "diffusion"} if asked else {"gaussian"})


def test_ratios_in_stages_are_drawn_by_annealing(data, splits, monkeypatch):
    drawn, annealing = [], generation.SAMPLERS["annealed"]

    def seen(prior, *args, **rest):
        drawn.append(prior)
        return annealing(prior, *args, **rest)

    monkeypatch.setitem(generation.SAMPLERS, "annealed", seen)
    monkeypatch.setattr(comparison, "TIMED", 40)
    changes = options(priors=["gaussian", "ncp", "ncp-multistage"], seeds=1, samples=40)
    found = compare(linear_vae(), data, splits, **changes | {"metrics": ["fd"]})
    assert drawn and all(prior.in_stages for prior in drawn)
    by = {score.prior: score.values["fd"] for score in found.scores}
    assert by["ncp-multistage"] < by["gaussian"]


def test_nll_of_a_prior_on_a_base_without_a_density_is_left_out(data, splits):
    changes = options(priors=["gaussian", "ncp", "ncp-snis"], seeds=1, samples=40)
    found = compare(linear_vae(), data, splits, **changes | {"metrics": ["nll", "fd"]})
    by = {score.prior: score.values for score in found.scores}
    assert "nll" in by["ncp"]
    assert "nll" not in by["ncp-snis"] and "fd" in by["ncp-snis"]
