"""MMDs and gaps of groups where the hole, and what mends it, are known."""

import math

import pytest
import torch
from test_group_samples import Tilt, hole
from toys import TwoGroups

from ncprior.data import Splits, as_data
from ncprior.figures import Figure
from ncprior.group_figures import largest_jsd, mmd_figures, overall
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import UnitRatio

ROWS = torch.arange(3000)
SPLITS = Splits(ROWS[:1000], ROWS[1000:1001], ROWS[1001:])


@pytest.fixture(scope="module")
def toy():
    return hole()


def gaussian_mmd(size, variance, bandwidth):
    """MMD^2 between N(0, variance I) and N(0, I)."""

    def mean(total):
        return (bandwidth**2 / (bandwidth**2 + total)) ** (size / 2)

    return mean(2 * variance) + mean(2.0) - 2 * mean(1 + variance)


def test_mmd_of_a_hole_and_of_the_exact_ratio(toy):
    """Four standard errors, of which the closed form is to the base; 0.002 for SIR's bias."""
    vae, prior, data, variance = toy
    found = mmd_figures(vae, prior, data, SPLITS, images=600, proposals=100)
    assert {*found} == {
        *(f"{kind}_{name}_0" for kind in ("mmd", "gap") for name in ("base", "ncp", "gain")),
        "ess_0", "ess_share_0", "mmd_base_1", "gap_base_1",
    }  # fmt: skip
    base, ncp, gain = (found[f"mmd_{name}_0"] for name in ("base", "ncp", "gain"))
    assert base.samples == 600 and base.unit == "MMD^2"
    bandwidth = float(base.note.rsplit(" ", 1)[1])
    expected = gaussian_mmd(3, variance, bandwidth)
    assert abs(base.value - expected) < 4 * base.se and expected > 10 * base.se
    assert abs(ncp.value) < 4 * ncp.se + 0.002
    assert gain.value == pytest.approx(base.value - ncp.value)
    assert found["ess_share_0"].value * 100 == pytest.approx(found["ess_0"].value)


def test_same_bandwidth_for_base_and_ncp(toy):
    """A ratio of 1 leaves the base prior, at the base prior's distance."""
    vae, _, data, _ = toy
    prior = NoiseContrastivePrior([Tilt(1.0), UnitRatio()])
    found = mmd_figures(vae, prior, data, SPLITS, images=600, proposals=2)
    gain = found["mmd_gain_0"]
    assert abs(gain.value) < 4 * gain.se < found["mmd_base_0"].value


@pytest.mark.parametrize("count", [9, 10])
def test_too_few_images_give_no_figures(toy, count):
    vae, prior, data, _ = toy
    splits = SPLITS._replace(test=ROWS[-count:])
    assert bool(mmd_figures(vae, prior, data, splits, proposals=2)) == (count == 10)


def test_names_tell_groups_from_the_whole():
    figure = Figure(0.1, "nats", 1, 0)
    names = ["jsd_0", "jsd_12", "ess_share_3", "mmd_base_3", "ess_share", "fd_base", "log_z", "kl"]
    figures = dict.fromkeys(names, figure) | {"jsd_12": figure._replace(value=0.3)}
    assert [*overall(figures)] == ["ess_share", "fd_base", "log_z", "kl"]
    assert largest_jsd(figures) == (12, figures["jsd_12"])
    assert largest_jsd({"jsd": figure}) == (None, figure)
    with pytest.raises(KeyError):
        largest_jsd({"fd_base": figure})


def test_gaps_of_a_hole_and_of_the_exact_ratio(toy):
    """q = N(0, 0.27 I) for p = N(0, I) in three dimensions.

    The best linear functions of squares are far apart; the exact ratio leaves nothing but noise
    and SIR's bias from 100 proposals, of order 1 / (100 ESS share) = 2 % of the gap.
    """
    vae, prior, data, _ = toy
    found = mmd_figures(vae, prior, data, SPLITS, images=600, proposals=100)
    base, ncp, gain = (found[f"gap_{name}_0"] for name in ("base", "ncp", "gain"))
    assert base.samples == 600 and base.unit == "s.d." and base.value > 0.7
    assert abs(ncp.value) < 4 * ncp.se + 0.03 * base.value
    assert gain.value == pytest.approx(base.value - abs(ncp.value))
    second = found["gap_base_1"]
    assert second.se < 0.1
    # Without a hole: a ratio of 1, and gaps that are noise.
    alike = NoiseContrastivePrior([Tilt(1.0), UnitRatio()])
    same = mmd_figures(vae, alike, data, SPLITS, images=600, proposals=50)
    assert same["gap_gain_0"].value == pytest.approx(0, abs=1e-6)
    assert same["gap_base_0"].value == pytest.approx(same["gap_ncp_0"].value)


def test_without_a_hole_gaps_are_standard_normal():
    """Images drawn from the VAE itself, whose posterior is exact: q(z_k | z_<k) is the prior.

    Of 2 groups and 12 seeds the squared scores sum to a chi square of 24 degrees, of standard
    deviation 7. An NCP that is wrong shows in the same data.
    """
    vae = TwoGroups()
    for parameter, value in ((vae.b, 0.7), (vae.c, 0.1), (vae.e, -0.05)):
        parameter.data.fill_(value)
    vae.sigma = 0.05
    spread = math.sqrt(0.02**2 + vae.sigma**2 + (0.1 * vae.s) ** 2)  # 0.07, so that none is cut off
    prior = NoiseContrastivePrior([Tilt(1.0), Tilt(0.7)])
    scores, wrong = [], []
    for seed in range(12):
        noise = torch.randn(1500, 1, 1, 3, generator=torch.Generator().manual_seed(seed))
        data, _ = as_data(0.5 + spread * noise, None, 0)
        splits = Splits(ROWS[:1000], ROWS[1000:1001], ROWS[1001:1500])
        found = mmd_figures(vae, prior, data, splits, proposals=20, seed=seed)
        scores += [found[f"gap_base_{k}"].value / found[f"gap_base_{k}"].se for k in (0, 1)]
        wrong.append(found["gap_gain_1"].value)
    assert 24 - 3 * 7 < sum(x**2 for x in scores) < 24 + 3.5 * 7
    assert sum(wrong) < 0
