"""Stage 2 on linear-Gaussian VAEs, whose log-ratio is known."""

import math

import pytest
import torch
from toys import TwoGroups, gaussian_images, linear_vae, true_log_ratio

import ncprior
from ncprior.normal import StandardNormal
from ncprior.numerics import log_mean_exp
from ncprior.priors import PRIORS
from ncprior.training.pairs import draw_pairs
from ncprior.training.presets import PRESETS
from ncprior.walk import from_posterior, walk

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}
SMALL = {"steps": 300, "evaluate_every": 50, "log_z_draws": 50_000, "batch_size": 128}
SMALL |= {"network_options": {"width": 32, "blocks": 2, "dropout": 0.0, "members": 4}}
MEAN, SPREAD = 0.8, 0.6


@pytest.fixture(scope="module")
def fitted():
    """VAE, images and prior: q(z) = N(0.8, 0.6^2 I) against p = N(0, I)."""
    images = gaussian_images(6000, torch.Generator().manual_seed(1))
    vae = linear_vae(MEAN, SPREAD)
    return vae, images, ncprior.fit_prior(vae, images, **SMALL, **QUIET)


@pytest.fixture(scope="module")
def error(fitted):
    """log r estimated less exact, at 20,000 draws of q."""
    noise = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(2))
    z = MEAN + SPREAD * noise
    return fitted[2].log_ratio(0, z).double() - true_log_ratio(z.double(), MEAN, SPREAD)


def moments_within(z, error, extra=0.0):
    """Mean and spread of draws are those of q, but for chance and the ratio's own error e.

    To first order a tilt exp(e) moves E z by Cov(e, z) <= sd(e) s and E (z - m)^2 by at most
    sd(e) sqrt(2) s^2.
    """
    n, e = len(z), float(error.std())
    assert ((z.mean(0) - MEAN).abs() < 4 * SPREAD / math.sqrt(n) + e * SPREAD + extra).all()
    relative = 4 * math.sqrt(2 / n) + math.sqrt(2) * e + extra / SPREAD
    assert ((z.var(0) / SPREAD**2 - 1).abs() < relative).all()


def test_recovers_the_log_ratio(error, fitted):
    """RMS error below 0.25 nats: 1.5 times the largest of 20 seeds; log r itself spreads by 0.93.

    The 5100 images that were fitted on move the mean of q by 0.6 / sqrt(5100) = 0.008, which alone
    is an error of about 0.03.
    """
    assert float(error.square().mean().sqrt()) < 0.25
    noise = torch.randn(5000, 2, generator=torch.Generator().manual_seed(3))
    z = MEAN + SPREAD * noise
    pair = torch.stack([fitted[2].log_ratio(0, z), true_log_ratio(z, MEAN, SPREAD)])
    assert float(torch.corrcoef(pair)[0, 1]) > 0.98


def test_log_z(error, fitted):
    """E_p[r] = E_q[exp(e)] exactly, so log Z is about E_q[e] + Var(e) / 2: near 0."""
    found = fitted[2].log_z
    at_q = float(log_mean_exp(error))
    se = float(error.exp().std() / error.exp().mean() / math.sqrt(len(error)))
    assert abs(found.value - at_q) < 4 * math.hypot(found.se, se)
    assert abs(found.value) < 4 * found.se + abs(float(error.mean())) + float(error.var())
    assert found.num == 50_000 and 1 < found.ess < 50_000


def test_reported_loss_is_that_of_the_exact_ratio(fitted):
    """Held-out loss: never far below the optimum, and above it by the fit's small excess."""
    group = fitted[2].record["groups"][0]
    noise = torch.randn(2, 100_000, 2, generator=torch.Generator().manual_seed(4)).double()
    at_q = true_log_ratio(MEAN + SPREAD * noise[0], MEAN, SPREAD)
    exact = float(ncprior.ratios.nce_loss(at_q, true_log_ratio(noise[1], MEAN, SPREAD)))
    # 900 held-out images: softplus spreads by about 0.6 under q and p.
    se = 0.6 * math.sqrt(1 / 900 + 1 / 9900)
    assert exact - 4 * se < group["loss"] < exact + 4 * se + 0.02
    low, high = group["loss_interval"]
    assert low < group["loss"] < high and high - low == pytest.approx(4 * se, rel=0.5)
    assert group["jsd"] == pytest.approx(math.log(2) - group["loss"] / 2)
    assert group["warnings"] == []


@pytest.mark.parametrize(
    ("sampler", "bias"),
    [
        ({"sampler": "sir", "proposals": 500}, 10 / 500),  # O(1/m)
        # The fitted ratio is flatter than the exact one where q has no mass, so that chains come
        # back slowly: 800 steps. The last steps' bias is 0.005 / (4 * 0.36) of the variance.
        ({"sampler": "langevin", "steps": 800}, 0.01),
    ],
    ids=["sir", "langevin"],
)
def test_samples(sampler, bias, error, fitted):
    """Moments of the fitted density, by quadrature; and those of q, up to the ratio's error."""
    vae, _, prior = fitted
    n = 1000
    z = ncprior.draw(vae, prior, n, **sampler).latents[0]
    axis = torch.linspace(-7, 7, 281)
    grid = torch.cartesian_prod(axis, axis)
    weights = prior.unnormalized_log_prob(grid).softmax(0)
    mean = weights @ grid
    variance = weights @ (grid - mean).square()
    fourth = weights @ (grid - mean) ** 4
    assert ((z.mean(0) - mean).abs() < 4 * (variance / n).sqrt() + bias).all()
    se = ((fourth - variance**2) / n).sqrt()
    assert ((z.var(0) - variance).abs() < 4 * se + bias).all()
    moments_within(z, error, bias)


def test_log_prob_integrates_to_one(fitted):
    prior = fitted[2]
    axis = torch.linspace(-7, 7, 281)
    density = prior.log_prob(torch.cartesian_prod(axis, axis)).exp()
    total = float(density.sum()) * float(axis[1] - axis[0]) ** 2
    assert total == pytest.approx(1, abs=4 * prior.log_z.se + 1e-3)


def test_the_vae_is_not_changed(rng):
    vae = linear_vae().train()
    before = {k: v.clone() for k, v in vae.state_dict().items()}
    options = SMALL | {"steps": 3, "evaluate_every": 3}
    ncprior.fit_prior(vae, gaussian_images(100, rng), **options, **QUIET)
    assert vae.training
    assert all(torch.equal(v, before[k]) for k, v in vae.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in vae.parameters())


def test_a_mixture_base_leaves_the_vae_in_training_mode(rng):
    vae = linear_vae().train()
    options = SMALL | {"steps": 3, "evaluate_every": 3}
    ncprior.fit_prior(vae, gaussian_images(100, rng), base="mixture", **options, **QUIET)
    assert vae.training


def test_mixture_base_from_end_to_end(tmp_path):
    """A posterior that N(0, I) could not reach: the mixture does most, the ratio little."""
    images = gaussian_images(3000, torch.Generator().manual_seed(1))
    vae = linear_vae(mean=9.0, spread=0.6)
    prior = ncprior.fit_prior(vae, images, base="mixture", **SMALL, **QUIET)
    assert isinstance(prior.base, ncprior.GaussianMixture)
    assert prior.record["groups"][0]["jsd"] < 0.02 and abs(prior.log_z.value) < 0.05
    prior.save_pretrained(tmp_path)
    prior = ncprior.NoiseContrastivePrior.from_pretrained(tmp_path)
    for options in ({"sampler": "sir", "proposals": 100}, {"sampler": "langevin"}):
        z = ncprior.draw(vae, prior, 1000, **options).latents[0]
        # 4 standard errors and, as the mixture saw 2550 images, 4 of theirs.
        assert ((z.mean(0) - 9).abs() < 4 * 0.6 * (1000**-0.5 + 2550**-0.5) + 0.02).all()
        assert ((z.std(0) / 0.6 - 1).abs() < 4 * (2000**-0.5 + 5100**-0.5) + 0.02).all()


def test_a_base_by_its_name():
    """A VampPrior is fitted to the images that the ratio is fitted on, through the encoder."""
    images = gaussian_images(800, torch.Generator().manual_seed(1))
    options = SMALL | {"steps": 30, "evaluate_every": 30}
    prior = ncprior.fit_prior(linear_vae(mean=1.5), images, base="vamp", **options, **QUIET)
    assert isinstance(prior.base, PRIORS["vamp"])
    z = prior.base.sample((2000,), generator=torch.Generator().manual_seed(0))
    assert ((z.mean(0) - 1.5).abs() < 0.3).all()  # N(0, I) would be 1.5 away


class SlowMixture(ncprior.GaussianMixture):
    """N(0, I) that says it is slow, and counts its draws."""

    slow_draws, drawn = True, 0

    def sample(self, sample_shape=(), *, generator=None):
        self.drawn += math.prod(sample_shape)
        return super().sample(sample_shape, generator=generator)


def test_a_slow_base_is_drawn_from_a_table(fitted):
    """Fifty thousand draws and a few for the checks, however many the steps see."""
    vae, images, quick = fitted
    base = SlowMixture(1, 2)
    options = {name: value for name, value in SMALL.items() if name != "log_z_draws"}
    prior = ncprior.fit_prior(vae, images, base=base, **options, **QUIET)
    assert 50_000 < base.drawn < 130_000  # the steps see 154,000 and the usual checks 400,000
    assert prior.record["groups"][0]["moments"]["kept"]
    jsd, plain = (p.record["groups"][0]["jsd"] for p in (prior, quick))
    assert abs(jsd - plain) < 0.01
    noise = torch.randn(5000, 2, generator=torch.Generator().manual_seed(3))
    z = MEAN + SPREAD * noise
    error = prior.log_ratio(0, z) - true_log_ratio(z, MEAN, SPREAD)
    assert float(error.square().mean().sqrt()) < 0.25


def test_any_density_as_base(rng):
    base = ncprior.GaussianMixture(1, 2)
    options = SMALL | {"steps": 3, "evaluate_every": 3}
    prior = ncprior.fit_prior(
        linear_vae(), gaussian_images(100, rng), base=base, **options, **QUIET
    )
    assert prior.base is base


def test_rows_are_split_and_recorded(rng):
    rows = torch.arange(10, 90)
    options = SMALL | {"steps": 3, "evaluate_every": 3}
    prior = ncprior.fit_prior(
        linear_vae(), gaussian_images(100, rng), rows=rows, heldout=0.25, **options, **QUIET
    )
    assert len(prior.heldout_rows) == 20 and set(prior.heldout_rows.tolist()) <= set(rows.tolist())
    assert (prior.record["fitted_images"], prior.record["heldout_images"]) == (60, 20)


def test_stops_when_the_heldout_loss_does_not_fall(rng):
    """The best weights are kept, not the last."""
    options = SMALL | {"steps": 2000, "evaluate_every": 5, "patience": 3, "learning_rate": 0.05}
    prior = ncprior.fit_prior(linear_vae(), gaussian_images(60, rng), **options, **QUIET)
    assert prior.record["steps"] < 2000
    assert prior.record["best_step"] == prior.record["steps"] - 15


def test_patience_waits_where_nothing_is_found_yet(rng):
    """q is p here, so that the held-out loss is chance's: it ends past half of the steps."""
    options = SMALL | {"steps": 100, "evaluate_every": 2, "patience": 3}
    images = gaussian_images(400, rng)
    prior = ncprior.fit_prior(linear_vae(0.0, 1.0), images, **options, **QUIET)
    assert 50 <= prior.record["steps"] < 100


@pytest.mark.parametrize("preset", ["small", "large", "near", "published"])
def test_presets(preset, rng):
    options = {"preset": preset, "steps": 2, "log_z_draws": 100, "match_moments": False}
    prior = ncprior.fit_prior(linear_vae(), gaussian_images(200, rng), **options, **QUIET)
    assert prior.record["settings"]["steps"] == 2
    assert prior.record["settings"]["warmup"] == 0  # a tenth of the steps at most
    assert prior.ratios[0].config["network"] == ("mlp" if preset == "published" else "residual")


@pytest.mark.parametrize(
    ("base", "preset"),
    [
        (None, "large"),
        ("gaussian", "large"),
        (StandardNormal(2), "large"),
        (ncprior.GaussianMixture(1, 2), "near"),
        ("mixture-1", "near"),
    ],
)
def test_default_preset_of_many_images(base, preset, rng):
    """Next to a base that was fitted there is less to find."""
    images, options = gaussian_images(20_000, rng), {"steps": 2, "log_z_draws": 100}
    found = ncprior.fit_prior(linear_vae(), images, base=base, **options, **QUIET).record
    assert found["settings"]["batch_size"] == PRESETS[preset]["batch_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "tiny"}, "preset must be one of small, large, "),
        ({"network": "cnn"}, "network must be one of mlp, residual, conv"),
        ({"steps": 0}, "steps must be positive"),
        ({"batch_size": -1}, "batch_size must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"warmup": -1}, "warmup must be at least 0 steps"),
        ({"heldout": 0.0}, "heldout = 0.0 of 50 images"),
        ({"heldout": 0.99}, "heldout = 0.99 of 50 images"),
        ({"base": "mixture-0"}, "base must be one of .* mixture-N .*, got 'mixture-0'"),
        ({"base": "flew"}, "base must be one of gaussian, mixture, .* mixture-N .*, got 'flew'"),
        ({"base": ncprior.GaussianMixture(1, 3)}, "event shape"),
    ],
)
def test_settings_that_cannot_work(options, message, rng):
    with pytest.raises(ValueError, match=message):
        ncprior.fit_prior(linear_vae(), gaussian_images(50, rng), **options, **QUIET)


def test_pairs_share_the_groups_before_them(rng):
    """Prior draws of group 2 follow the posterior's z1, which is their context."""
    vae = TwoGroups()
    images = torch.rand(1, 1, 1, 3, generator=rng, dtype=torch.float64)
    n = 20_000
    evidence = tuple(part.repeat(n, 1) for part in vae.encode(images))
    first, second = draw_pairs(vae, evidence, n, rng)
    assert first.context is None
    torch.testing.assert_close(second.context, first.posterior)
    # In the coordinate of the ratios each prior is N(0, I): variance 1, to 4 standard errors.
    for pair in (second.prior, first.prior):
        assert abs(pair.square().mean() - 1) < 4 * math.sqrt(2 / (3 * n))
    # z2 of the posterior and of the prior hang on the same z1, in that coordinate not at all.
    exact = (vae.group((n, [first.posterior]), vae.encode(images))).posterior
    expected = (exact.loc - vae.b * first.posterior) / vae.s
    assert (second.posterior - expected).mean().abs().detach() < 4 * float(
        exact.scale.max().detach()
    ) / vae.s / n**0.5
    assert not second.prior.requires_grad


def test_pairs_of_some_groups_are_those_of_all(rng):
    vae, images = TwoGroups(), torch.rand(50, 1, 1, 3, generator=rng, dtype=torch.float64)
    every = draw_pairs(vae, vae.encode(images), 50, rng.manual_seed(5))
    for k in range(2):
        (one,) = draw_pairs(vae, vae.encode(images), 50, rng.manual_seed(5), [k])
        assert torch.equal(one.posterior, every[k].posterior)
        assert torch.equal(one.prior, every[k].prior)


def test_toy_posterior_is_the_aggregate(fitted, rng):
    vae, images, _ = fitted
    z = walk(vae, from_posterior(rng), len(images), vae.encode(images)).latents[0]
    moments_within(z, torch.zeros(2))


def test_resuming_on_another_vae_is_refused(rng, tmp_path):
    images = gaussian_images(200, rng)
    options = {"evaluate_every": 5, "checkpoint_every": 5, "network_options": {"members": 2}}
    ncprior.fit_prior(linear_vae(), images, steps=8, directory=tmp_path, **options, **QUIET)
    again = {"directory": tmp_path, "resume": True, **options, **QUIET}
    with pytest.raises(ValueError, match="fingerprint"):
        ncprior.fit_prior(linear_vae(mean=3.0), images, steps=8, **again)
    with pytest.raises(ValueError, match="steps was 8, now it is 4"):
        ncprior.fit_prior(linear_vae(), images, steps=4, **again)
