"""Laws and errors; what holds for every sampler is in `tests/samplers/test_contract.py`."""

import math

import pytest
import torch
from toys import ExactFlat, TwoGroups, standard_normal

import ncprior
from ncprior.generation import pool_sizes
from ncprior.numerics import LogZ
from ncprior.ratios import ResidualRatio
from ncprior.samplers.sir import enough_proposals


class Tilt(torch.nn.Module):
    """log r = a z: turns N(0, T^2) into N(a T^2, T^2)."""

    def __init__(self, a=0.6):
        super().__init__()
        self.a = a

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


def tilted():
    return ncprior.NoiseContrastivePrior([Tilt()], standard_normal(2))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("sampler", ["sir", "langevin"])
def test_law_of_a_tilted_base(sampler, temperature):
    n, m, size = 1500, 400, 0.02
    options = {"proposals": m, "steps": 400, "step_size": 0.1, "final_step_size": size}
    found = ncprior.draw(
        ExactFlat(), tilted(), n, sampler=sampler, temperature=temperature, **options
    )
    (z,), v = found.latents, temperature**2
    # 4 standard errors; SIR's O(1/m) (see test_sir) or Langevin's last step size (test_langevin).
    bias = 0.6 * math.exp(0.36) / m if sampler == "sir" else size / 4
    assert ((z.mean(0) - 0.6 * v).abs() < 4 * math.sqrt(v / n) + bias).all()
    assert ((z.var(0) / v - 1).abs() < 4 * math.sqrt(2 / n) + bias).all()
    assert found.ess.isnan().all() == (sampler == "langevin")


def test_langevin_starts_from_the_tempered_base():
    options = {"temperature": 0.5, "seed": 3}
    (base,) = ncprior.draw(ExactFlat(), None, 5, **options).latents
    still = {"sampler": "langevin", "steps": 1, "step_size": 1e-12, "final_step_size": None}
    (found,) = ncprior.draw(ExactFlat(), tilted(), 5, **options, **still).latents
    torch.testing.assert_close(found, base, rtol=0, atol=1e-4)


def test_two_groups_by_sir():
    """Tilting z2 | z1 moves it by a s and leaves z1 alone: the locally normalised product.

    The ratio sees z2 in the coordinate in which p(z2 | z1) is N(0, I).
    """

    class Flat(torch.nn.Module):
        def forward(self, z, context=None):
            return torch.zeros(len(z), dtype=z.dtype)

    vae, n, m = TwoGroups(), 1500, 400
    prior = ncprior.NoiseContrastivePrior([Flat(), Tilt()])
    z1, z2 = ncprior.draw(vae, prior, n, proposals=m).latents
    residual = z2 - vae.b.item() * z1
    error = 4 / math.sqrt(3 * n)
    assert abs(z1.mean()) < error and abs(z1.var() - 1) < math.sqrt(2) * error
    assert abs(residual.mean() - 0.6 * vae.s) < error * vae.s + 1 / m
    assert abs(residual.var() / vae.s**2 - 1) < math.sqrt(2) * error + 1 / m


def test_base_law_and_temperature():
    n = 2000
    (z,) = ncprior.draw(ExactFlat(), None, n, temperature=0.5).latents
    assert abs(z.mean()) < 4 * 0.5 / math.sqrt(2 * n)
    assert abs(z.var() / 0.25 - 1) < 4 * math.sqrt(2 / (2 * n))


def test_reconstructions_are_of_the_images_given():
    """Every image comes up, and each draw decodes to one of them: the posterior is narrow."""
    images = torch.linspace(0, 1, 5, dtype=torch.float64).view(5, 1, 1, 1).repeat(1, 1, 1, 2)
    found = ncprior.draw(ExactFlat(c=1.0, sigma=1e-3), None, 200, images=images)
    nearest, which = (found.images[:, 0, 0, :1] - torch.linspace(0, 1, 5)).abs().min(1)
    assert nearest.max() < 0.01 and len(which.unique()) == 5


def test_images_are_the_means_of_the_likelihood():
    vae = ExactFlat()
    found = ncprior.draw(vae, None, 4)
    torch.testing.assert_close(found.images, vae.decoder(found.latents[0]).detach())
    assert torch.equal(ncprior.generate(vae, None, 4), found.images)


def test_ess_is_that_of_the_pool():
    """The closed form of `test_sir`: ESS / m -> exp(-d a^2)."""
    ess = ncprior.draw(ExactFlat(), tilted(), 200, proposals=2000).ess
    assert ess.shape == (1, 200)
    assert float(ess.mean() / 2000) == pytest.approx(math.exp(-2 * 0.36), rel=0.05)


def test_pools_choose_their_size():
    """From the ESS share that the fit knows, or by a pilot, where 1 / share = exp(2 a^2)."""
    a, vae = 0.6, ExactFlat()
    exact = enough_proposals(math.exp(-2 * a**2))
    assert pool_sizes(vae, tilted()) == (exact,) == (16,)
    known = ncprior.NoiseContrastivePrior(
        [Tilt(a)], standard_normal(2), log_z=LogZ(a**2, 0.01, 10.0, 1000, 0.1)
    )
    assert pool_sizes(vae, known) == (enough_proposals(0.01),) == (1000,)
    flat = ncprior.NoiseContrastivePrior(
        [Tilt(0.0)], standard_normal(2), log_z=LogZ(0.0, 0.0, 1000 * (1 + 1e-9), 1000, 0.1)
    )
    assert pool_sizes(vae, flat) == (16,)
    cooler = pool_sizes(vae, known, temperature=0.5)  # the pilot again: exp(2 a^2 T^2)
    assert cooler == (enough_proposals(math.exp(-2 * a**2 / 4)),) == (16,)

    chosen = ncprior.draw(vae, tilted(), 7, batch_size=3, seed=4)
    given = ncprior.draw(vae, tilted(), 7, proposals=exact, seed=4)
    assert torch.equal(chosen.latents[0], given.latents[0])
    assert torch.equal(chosen.ess, given.ess) and (chosen.ess <= exact).all()


def test_pools_of_groups_choose_their_sizes():
    """Half of the nats for each of two groups; none where there is no ratio."""
    vae = TwoGroups()
    prior = ncprior.NoiseContrastivePrior([Tilt(0.1), Tilt(0.9)])
    first, second = pool_sizes(vae, prior)
    assert first == 16 and second == enough_proposals(math.exp(-3 * 0.81), 0.05) == 256
    assert pool_sizes(vae, prior.only([1])) == (1, 128)
    found = ncprior.draw(vae, prior, 20)
    assert (found.ess[0] <= 16).all() and (found.ess[1] > 16).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": "hmc"}, "sampler must be one of auto, sir, langevin, annealed, got 'hmc'"),
        ({"num": 0}, "num must be positive, got 0"),
        ({"proposals": 0}, 'proposals must be "auto", a positive number or 1 of them'),
        ({"proposals": "many"}, "proposals must be .* got 'many'"),
        ({"proposals": [4, 4]}, "proposals must be .* 1 of them"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"sampler": "langevin", "steps": 0}, "steps, step_size and final_step_size"),
        ({"chunk": -1}, "chunk and block must be at least 1"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ncprior.draw(ExactFlat(), tilted(), **({"num": 2, "proposals": 4} | options))


def test_prior_of_another_vae():
    with pytest.raises(ValueError, match="fitted for another VAE"):
        ncprior.draw(TwoGroups(), tilted(), 2)


def test_an_error_leaves_the_training_mode_alone():
    vae = ExactFlat().train()
    broken = ncprior.NoiseContrastivePrior([Tilt(math.nan)], standard_normal(2))
    with pytest.raises(ValueError, match="NaN"):
        ncprior.draw(vae, broken, 2, proposals=4)
    assert vae.likelihood.training


def test_parts_that_were_frozen_stay_frozen():
    vae = ExactFlat().train()
    vae.decoder.eval()
    ncprior.draw(vae, None, 2)
    assert vae.training and not vae.decoder.training


def test_bfloat16_changes_little(digits_run):
    """Ratios rounded to 8 bits: most draws pick the same proposal, and the prior stays."""
    vae, prior = digits_run
    weights = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    exact, rough = (
        ncprior.draw(vae, prior, 100, proposals=50, bfloat16=lower) for lower in (False, True)
    )
    same = (exact.latents[0] == rough.latents[0]).all(1).double().mean()
    assert same > 0.85
    assert exact.latents[0].dtype == rough.latents[0].dtype == torch.float32
    assert all(torch.equal(tensor, weights[name]) for name, tensor in prior.state_dict().items())


@pytest.fixture
def digits_run():
    """A VAE and a ratio as they come, untrained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = ncprior.build_vae((1, 8, 8), preset="digits")
        ratio = ResidualRatio(16, width=16, members=2).eval()
    return vae, ncprior.NoiseContrastivePrior([ratio], vae.prior)
