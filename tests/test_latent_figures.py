import math

import pytest
import torch
from toys import ExactFlat, TwoGroups, gaussian_images, linear_vae, standard_normal, true_log_ratio

import ncprior
from ncprior.data import as_data
from ncprior.generation import Draws
from ncprior.group_figures import overall
from ncprior.group_samples import GroupSamples
from ncprior.latent_figures import (
    group_latent_figures,
    jsd_on_test_images,
    latent_figures,
    posterior_draws,
)
from ncprior.ratios import UnitRatio


class TrueRatio(torch.nn.Module):
    """log q(z) / p(z) of `linear_vae`."""

    def forward(self, z, context=None):
        return true_log_ratio(z)


def draws_of(z):
    """Images are not looked at."""
    return Draws(torch.zeros(len(z), 1, 1, 2), [z], torch.full((1, len(z)), math.nan))


def fresh(n, seed, mean=0.0, spread=1.0):
    z = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed))
    return draws_of(mean + spread * z)


@pytest.fixture(scope="module")
def problem():
    """q(z) = N(0.8, 0.6^2 I) on 300 test and 300 validation images of 1500."""
    images = gaussian_images(1500, torch.Generator().manual_seed(0))
    data, splits = as_data(images, None, 0)
    rows = torch.cat([splits.train, splits.validation, splits.test])
    return (
        linear_vae(),
        data,
        splits._replace(train=rows[:900], validation=rows[900:1200], test=rows[1200:]),
    )


@pytest.fixture(scope="module")
def measured(problem):
    """An NCP that is exactly the posterior."""
    draws = {"base": fresh(500, 1), "ncp": fresh(500, 2, 0.8, 0.6)}
    draws["reconstruction"] = fresh(500, 3)
    return latent_figures(*(problem[0], None, *problem[1:]), draws)


def test_base_is_told_apart_and_a_perfect_prior_is_not(measured):
    """p-values of equal laws are below 0.01 once in a hundred seeds; others were tried too."""
    for name in ("mmd", "c2st"):
        assert measured[f"{name}_base_p"].value < 0.01
        assert measured[f"{name}_ncp_p"].value > 0.01 and measured[f"{name}_floor_p"].value > 0.01
    assert measured["c2st_base"].value > 0.7
    for name in ("ncp", "floor"):
        assert abs(measured[f"c2st_{name}"].value - 0.5) < 5 * measured[f"c2st_{name}"].se
        assert abs(measured[f"mmd_{name}"].value) < 5 * measured[f"mmd_{name}"].se
        assert measured[f"swd_{name}"].value < measured["swd_base"].value / 4
    assert not any("reconstruction" in name for name in measured)


def test_sliced_wasserstein_of_the_base_in_closed_form(measured):
    """Between N(0.8, 0.6^2 I) and N(0, I): 0.8^2 + 0.4^2 in squares."""
    found = measured["swd_base"]
    assert abs(found.value - math.sqrt(0.8**2 + 0.4**2)) < 4 * found.se


def test_what_is_behind_the_figures(measured):
    assert {figure.samples for figure in measured.values()} == {300}
    assert measured["mmd_base"].unit == "MMD^2" and measured["mmd_base_p"].unit == "p-value"
    assert "200 further draws to learn from" in measured["c2st_base"].note
    assert "0 further draws" in measured["c2st_floor"].note
    for name, figure in measured.items():
        assert figure.error() or name.endswith("_p")


def test_fewer_images_and_metrics_and_the_same_seed(problem):
    vae, *rest = problem
    draws = {"base": fresh(60, 1), "another": fresh(60, 2)}
    first, again = (
        latent_figures(vae, None, *rest, draws, metrics=["swd"], images=30) for _ in range(2)
    )
    assert first == again
    assert list(first) == ["swd_base", "swd_another", "swd_floor"]
    assert first["swd_base"].samples == 30
    assert latent_figures(vae, None, *rest, draws, images=19) == {}


@pytest.mark.parametrize(("validation", "rows"), [(300, 300), (100, 200), (0, 150)])
def test_floor_has_as_many_rows(problem, validation, rows):
    """Other images than those of the test set are needed, or a part of the test set is."""
    vae, data, splits = problem
    splits = splits._replace(validation=splits.validation[:validation])
    found = latent_figures(vae, None, data, splits, {"base": fresh(300, 1)}, metrics=["swd"])
    assert {figure.samples for figure in found.values()} == {rows}
    assert found["swd_floor"].value < found["swd_base"].value / 4


def test_long_latents_go_to_principal_components(problem):
    """600 numbers of which 2 vary: what was fitted on training images finds them."""
    vae, data, splits = problem
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(600, 2, generator=generator)).Q

    class Long(type(vae.encoder)):
        def forward(self, images):
            loc, _ = super().forward(images)
            return loc @ basis.T, torch.full((len(loc), 600), -9.0)

    long = linear_vae()
    long.encoder = Long()
    long.latent_size, long.prior = 600, standard_normal(600).float()
    draws = {"base": draws_of(fresh(300, 1).latents[0] @ basis.T)}
    found = latent_figures(long, None, data, splits, draws, metrics=["swd"])
    # In 500 components each direction sees 2 / 500 of the squares that it would see in 2.
    spread = math.sqrt(0.6**2 - 0.3**2)
    expected = math.sqrt((2 * 0.8**2 + 2 * (1 - spread) ** 2) / 500)
    assert abs(found["swd_base"].value - expected) < 4 * found["swd_base"].se + 0.05 * expected


def test_posterior_draws_follow_the_aggregate_posterior(problem):
    vae, data, splits = problem
    z = posterior_draws(vae, data, splits.train)
    assert z.shape == (900, 2)
    assert ((z.mean(0) - 0.8).abs() < 4 * 0.6 / 30).all()
    assert ((z.std(0) / 0.6 - 1).abs() < 4 / math.sqrt(2 * 900)).all()
    assert torch.equal(z, posterior_draws(vae, data, splits.train, batch_size=500))
    with pytest.raises(ValueError, match="the VAE has 2"):
        posterior_draws(TwoGroups(), data, splits.train)


def test_jsd_on_test_images(problem):
    """With the true ratio it is the JSD, by numbers over both axes, which are independent."""
    vae, *rest = problem
    prior = ncprior.NoiseContrastivePrior([TrueRatio()], vae.prior)
    found = jsd_on_test_images(vae, prior, *rest)
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64)
    z = torch.cartesian_prod(grid, grid)
    p = torch.exp(-z.square().sum(1) / 2) / (2 * math.pi)
    q = p * true_log_ratio(z).exp()
    area = float(grid[1] - grid[0]) ** 2
    exact = 0.5 * float((q * (2 * q / (p + q)).log() + p * (2 * p / (p + q)).log()).sum()) * area
    assert abs(found.value - exact) < 4 * found.se and found.se < 0.03
    wrong = ncprior.NoiseContrastivePrior([Halved()], vae.prior)
    assert jsd_on_test_images(vae, wrong, *rest).value < found.value  # a lower bound


class Halved(TrueRatio):
    def forward(self, z, context=None):
        return 0.3 * super().forward(z)


def test_groups_are_compared_in_pairs():
    """Contexts spread far more than what sets q and base apart; only pairs can see it."""
    rng = torch.Generator().manual_seed(0)
    common = 5 * torch.randn(150, 1, generator=rng)
    q, base, ncp = (common + torch.randn(150, 1, generator=rng) + s for s in (0.0, 1.0, 0.0))
    samples = GroupSamples(q, base, ncp, None)
    found = group_latent_figures(3, samples, metrics=["mmd", "swd"])
    assert overall(found) == {}  # all are of a group
    assert {*found} == {
        "mmd_base_p_3", "mmd_ncp_p_3", "mmd_floor_p_3",
        "swd_base_3", "swd_ncp_3", "swd_floor_3",
    }  # fmt: skip
    assert found["mmd_base_p_3"].value < 0.01 < found["mmd_ncp_p_3"].value
    assert found["swd_floor_3"].samples == 75
    unfitted = group_latent_figures(0, GroupSamples(q, base, None, None), metrics=["c2st"])
    assert {*unfitted} == {"c2st_base_0", "c2st_base_p_0", "c2st_floor_0", "c2st_floor_p_0"}


def test_several_groups_are_walked():
    vae = TwoGroups(widen=0.5)
    noise = torch.randn(300, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    data, splits = as_data((0.5 + 0.4 * noise).clamp(0, 1), None, 0)
    prior = ncprior.NoiseContrastivePrior([UnitRatio(), UnitRatio()])
    found = latent_figures(vae, prior, data, splits, {}, metrics=["swd"])
    assert {*found} == {f"swd_base_{k}" for k in (0, 1)}  # 30 test images, halves of 15
    assert latent_figures(vae, None, data, splits, {}) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ["mmd", "fd"]}, "metrics must be a list of mmd, c2st, swd"),
        ({"metrics": "mmd"}, "metrics must be a list"),
        ({"images": 0}, "images must be at least 1"),
        ({"draws": {"ncp": fresh(60, 1)}}, 'draws must hold "base", got ncp'),
    ],
)
def test_rejects(problem, options, message):
    vae, *rest = problem
    draws = options.pop("draws", {"base": fresh(60, 1)})
    with pytest.raises(ValueError, match=message):
        latent_figures(vae, None, *rest, draws, **options)


def test_exact_flat_has_no_hole():
    """Its aggregate posterior on its own data is its prior."""
    vae = ExactFlat()
    noise = torch.randn(1500, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    images = (0.5 + vae.spread * noise).double()  # beyond [0, 1] here and there

    class Plain:
        redrawn = False

        def batch(self, rows, generator=None):
            return images[rows]

    _, splits = as_data(images.clamp(0, 1).float(), None, 0)
    base = {"base": fresh(500, 1)}
    found = latent_figures(vae, None, Plain(), splits, base, metrics=["mmd", "swd"])
    assert found["mmd_base_p"].value > 0.01
    assert found["swd_base"].value < 3 * found["swd_floor"].value
