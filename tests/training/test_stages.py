import math

import pytest
import torch
from toys import TwoGroups, gaussian_images, linear_vae

import ncprior
from ncprior.generation import pool_sizes, sampler_of
from ncprior.priors import SNISPrior
from ncprior.ratios import SummedRatio
from ncprior.training import stages as module
from ncprior.training.loop import Interrupted

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}
TINY = {
    "network_options": {"width": 8, "blocks": 1, "members": 1},
    "steps": 12,
    "batch_size": 32,
    "evaluate_every": 4,
}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "POOLS", 3)
    monkeypatch.setattr(module, "HELDOUT_POOLS", 2)


@pytest.fixture
def images(rng):
    return gaussian_images(120, rng)


def fit(images, mean=2.0, spread=0.3, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = linear_vae(mean, spread, 0.1)
    return ncprior.fit_prior(vae, images, **(TINY | QUIET | options))


@pytest.mark.slow
def test_reaches_a_posterior_far_from_the_base(rng):
    """q = N(4, 0.2^2 I), of which the nearest of 10^6 draws of the base is 8 spreads away."""
    vae, images = linear_vae(4.0, 0.2, 0.1), gaussian_images(1500, rng)
    options = {"network_options": {"width": 32, "blocks": 1, "members": 1}, "steps": 200}
    prior = ncprior.fit_prior(vae, images, stages="adaptive", **options, **QUIET)
    found = prior.record["groups"][0]
    assert found["stages"][0]["jsd"] > 0.6
    assert found["left"]["jsd"] <= module.INDISTINGUISHABLE_JSD
    assert 2 <= len(found["stages"]) < module.MOST_STAGES
    n = 200
    z = ncprior.draw(vae, prior, n, sampler="annealed").latents[0]
    # A JSD of 0.02 allows for a share s of stragglers, as it is about s log(2) / 2, or for a shift
    # of the others by 0.4 spreads, as it is about shift^2 / 8.
    near = ((z - 4).abs() < 5 * 0.2).all(1)
    most = 2 * module.INDISTINGUISHABLE_JSD / math.log(2)
    assert 1 - near.double().mean() < most + 4 * math.sqrt(most / n)
    assert abs(z[near].mean() - 4) < (4 / math.sqrt(2 * n) + 0.4) * 0.2
    assert 0.6 < z[near].std() / 0.2 < 1.5


def test_a_staged_prior_is_a_prior_like_any_other(few, images, tmp_path):
    vae = linear_vae(2.0, 0.3, 0.1)
    prior = fit(images, stages=2)
    (ratio,) = prior.ratios
    assert isinstance(ratio, SummedRatio)
    assert len(ratio.parts) == 2
    assert prior.record["settings"]["steps"] == 12
    assert prior.record["steps"] == 36  # two stages and what judges them
    found = prior.record["groups"][0]
    assert [set(stage) >= {"jsd", "levels", "acceptance"} for stage in found["stages"]] == [
        True
    ] * 2
    assert 0 <= found["left"]["loss"] <= 2
    assert prior.log_z is not None
    assert prior.log_z.num == 5
    z = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.log_ratio(0, z), sum(part(z) for part in ratio.parts))

    prior.save_pretrained(tmp_path)
    again = ncprior.NoiseContrastivePrior.from_pretrained(tmp_path)
    assert torch.equal(again.log_ratio(0, z), prior.log_ratio(0, z))
    assert again.record == prior.record
    assert again.log_z == prior.log_z
    for sampler in ("sir", "langevin", "annealed"):
        options = {"sampler": sampler, "proposals": 20, "steps": 5, "particles": 4}
        a, b = (ncprior.draw(vae, p, 3, **options).latents[0] for p in (prior, again))
        assert torch.equal(a, b)
        assert a.isfinite().all()


def test_stages_are_drawn_by_annealing_where_nothing_is_said(few, images):
    vae, prior = linear_vae(2.0, 0.3, 0.1), fit(images, stages=2)
    plain, annealed = (ncprior.draw(vae, prior, 3, **options).latents[0] for options in (
        {}, {"sampler": "annealed"},
    ))  # fmt: skip
    assert torch.equal(plain, annealed)
    assert sampler_of(fit(images), "auto") == sampler_of(None) == "sir"


def test_pool_size_is_not_taken_from_annealed_pools(few, images):
    """log Z of stages has the share of pools that count, which says nothing of proposals."""
    vae, prior = linear_vae(4.0, 0.2, 0.1), fit(images, mean=4.0, spread=0.2, stages=1, steps=200)
    staged = ncprior.NoiseContrastivePrior([SummedRatio([prior.ratios[0]])], vae.prior)
    staged.log_z = prior.log_z._replace(ess=5.0, num=5)
    assert pool_sizes(vae, staged)[0] > 100


@pytest.mark.parametrize("base", ["snis", "ebm", "two-stage"])
def test_stages_need_a_base_whose_density_is_known(few, images, base):
    with pytest.raises(ValueError, match=f"density is known, not {base}"):
        fit(images, stages=2, base=base)


def test_annealing_needs_a_base_whose_density_is_known(images):
    vae = linear_vae(2.0, 0.3, 0.1).with_prior(SNISPrior(2, proposals=4))
    prior = ncprior.fit_prior(vae, images, **(TINY | QUIET | {"log_z_draws": 100}))
    with pytest.raises(ValueError, match="density is known, not a SNISPrior; use sir"):
        ncprior.draw(vae, prior, 3, sampler="annealed")


def test_same_seed_same_prior(few, images):
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    a, b, c = (fit(images, stages=2, seed=seed).log_ratio(0, z) for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_stops_where_nothing_can_be_told(few, images):
    """q = p: the first classifier is kept, and the second finds nothing."""
    prior = fit(images, mean=0.0, spread=1.0, stages="adaptive")
    assert len(prior.record["groups"][0]["stages"]) == 1
    assert prior.record["groups"][0]["left"]["jsd"] <= module.INDISTINGUISHABLE_JSD


def test_resumed_between_and_within_stages(few, images, tmp_path, monkeypatch):
    whole = fit(images, stages=2, checkpoint_every=4)
    original, calls = module.optimise, []

    def stop_in_the_second(job, *args, **options):
        calls.append(job)
        if len(calls) == 2:
            evaluate = job.evaluate

            def interrupted(step):
                if step > 4:
                    raise Interrupted("now")
                return evaluate(step)

            job.evaluate = interrupted
        return original(job, *args, **options)

    monkeypatch.setattr(module, "optimise", stop_in_the_second)
    with pytest.raises(Interrupted):
        fit(images, stages=2, directory=tmp_path, checkpoint_every=4)
    assert {path.name for path in tmp_path.glob("*.pt")} == {
        "ncp-checkpoint.pt",  # the first stage, done
        "ncp-stage-2-checkpoint.pt",
    }
    monkeypatch.setattr(module, "optimise", original)
    with pytest.raises(ValueError, match="another run"):
        fit(images, stages=3, directory=tmp_path, resume=True, checkpoint_every=4)
    resumed = fit(images, stages=2, directory=tmp_path, resume=True, checkpoint_every=4)
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resumed.log_ratio(0, z), whole.log_ratio(0, z))
    assert resumed.record == whole.record
    assert not list(tmp_path.glob("*.pt"))


def test_never_more_confident_than_trained(few, images):
    """Where all is separated the loss has no smallest temperature."""
    prior = fit(images, mean=9.0, spread=0.1, stages=1 + 1, steps=40, learning_rate=0.02)
    assert all(stage["temperature"] <= 1 for stage in prior.record["groups"][0]["stages"])


@pytest.mark.parametrize("stages", [0, -1, 2.5, True, "many"])
def test_rejects_other_numbers_of_stages(images, stages):
    with pytest.raises(ValueError, match="stages must be"):
        fit(images, stages=stages)


def test_rejects_several_groups():
    with pytest.raises(ValueError, match="one latent group"):
        ncprior.fit_prior(TwoGroups(), torch.rand(20, 1, 1, 3), stages=2)
