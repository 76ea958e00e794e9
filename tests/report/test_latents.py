"""The section on latent groups: what a page says of a hierarchical run, and its plots."""

import re

import pytest
import torch

import ncprior
from ncprior.diagnosis import held_out_figures
from ncprior.figures import Figure
from ncprior.group_findings import GroupFinding
from ncprior.report import group_plots, plots, words
from ncprior.runs import Run

from .test_build import FIGURES, Reader, assert_self_contained, read
from .test_plots import GROUP

QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained NVAE of 5 groups, of which 3 were fitted."""
    recipe = {"data": {"source": "digits"}, "vae": {"preset": "nvae-digits"}}
    run = Run.create(tmp_path_factory.mktemp("hierarchical") / "run", recipe)
    data, splits = run.load_data()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run.save_vae(ncprior.build_vae(data.image_shape, **run.section("vae")))
    prior = ncprior.fit_prior(
        run.load_vae(), data, rows=splits.train[:40], groups="0,2-3", preset="groups-small",
        network_options={"width": 4, "stages": 1}, heldout=0.5, steps=2, evaluate_every=1,
        batch_size=8, directory=run.path, **QUIET,
    )  # fmt: skip
    prior.record["groups"][3]["kl"] = 0.001  # of a trained NVAE some always are
    run.save_prior(prior)
    return run


def gaps(k, base, ncp):
    values = {"base": base, "ncp": ncp, "gain": base - ncp}
    return {f"gap_{n}_{k}": Figure(v, "s.d.", 300, 0, 0.01) for n, v in values.items()}


def test_unmeasured(run):
    found = read(run)
    assert_sections(found)
    assert "Of its classifiers, that of group" in found.words
    assert "Not measured yet: gap closed, ESS share." in found.words
    assert "not fitted : keeps its base prior" in found.words and "Gaps:" not in found.words
    assert "3 of 5" in found.words and "keeps no log of stage 2" not in found.words
    # ELBO and KL have no log; loss, ESS, JSD by group, losses by step, log r of active groups.
    assert found.tags.count("svg") == 4 + 2
    assert columns_of(found) == 7


def test_measured(run):
    prior = run.load_prior(run.load_vae())
    measured = held_out_figures(prior) | gaps(0, 0.5, 0.04) | gaps(2, 0.2, 0.21)
    run.add_metrics(FIGURES | measured | {"gap_base_1": Figure(0.3, "s.d.", 300, 0, 0.02)})
    found = read(run)
    assert_sections(found)
    assert "0.50 ± 0.01" in found.words and "0.30 ± 0.02" in found.words
    assert "Gaps: 300 test images" in found.words and columns_of(found) == 9
    assert "closes 75 % (± 5)" in found.words and "Not measured" not in found.words
    assert "nce loss 0" not in found.words.lower()  # the table of all figures is of the whole
    jsd = measured["jsd_2"]
    run.add_metrics({"jsd_2": jsd._replace(value=jsd.value + 0.1)})
    assert "its JSD of group 2 is" in read(run).words
    (run.path / "metrics.json").unlink()


def columns_of(found):
    """How many columns the table of groups has, in its head as in every line."""
    table = found.page.split('<table class="groups">')[1].split("</table>")[0]
    (count,) = {len(re.findall("<t[hd] |<td>", line)) for line in table.split("<tr>")[1:]}
    return count


def assert_sections(found):
    sections = found.sections
    assert "groups" in sections and "ratios" not in sections
    found.sections = ["ratios" if name == "groups" else name for name in sections]
    order = ["verdict", "numbers", "images", "figures", "ratios", "training", "methods"]
    assert found.sections == order
    found.sections = ["verdict", "numbers", "images", "figures", "training", "ratios", "methods"]
    assert_self_contained(found)


def findings():
    """Thirty groups: a few are alike, some are not fitted, one is separated."""
    found = []
    for k in range(30):
        loss = max(0.0, 1.386 - 0.002 * k**2)
        figures = {
            "nce_loss": Figure(loss, "nats", 9, 0, interval=(loss - 0.01, loss + 0.01)),
            "jsd": Figure(0.693 - loss / 2, "nats", 9, 0, interval=(0.1, 0.2)),
            "ess_share": Figure(max(1e-4, 2.7 ** (loss * 5 - 7)), "of proposals", 9, 0),
            "mmd_base": Figure(0.02, "MMD^2", 9, 0, 0.001),
            "mmd_ncp": Figure(-0.001, "MMD^2", 9, 0, 0.001),
            "gap_base": Figure(0.3, "s.d.", 9, 0, 0.01),
            "gap_ncp": Figure(-0.02, "s.d.", 9, 0, 0.01),
        }
        found.append(GroupFinding(k, None, figures if k % 7 else {}, "mended"))
    return found


PLOTS = (group_plots.losses, group_plots.jsds, group_plots.mmds, group_plots.gaps)


def all_plots(of):
    return [*(f(of) for f in PLOTS),
            group_plots.ess_by_loss(of)]  # fmt: skip


def test_plots_can_stand_together_in_the_colours_of_the_page():
    of = findings()
    small = group_plots.small_log_ratios([(0, GROUP), (11, GROUP)])
    svgs = [plot.svg for plot in all_plots(of)] + [svg for _, svg in small.plots]
    svgs.append(plots.nce_of_groups([[{"step": 1, "heldout_loss_0": 1.0}]]).svg)
    ids = re.findall(r'\bid="([^"]+)"', "".join(svgs))
    assert len(ids) == len(set(ids))
    for svg in svgs:
        assert "var(--" in svg and not re.findall(r"(?:fill|stroke): *(#[0-9a-f]{3,6})", svg)
        Reader().feed(svg)
    assert [label for label, _ in small.plots] == ["group 0", "group 11"]


def test_plots_of_a_single_fitted_group():
    for plot in all_plots(findings()[6:8]):
        assert plot.svg.count("<svg") == 1


def test_numbers_beside_points_lie_upon_nothing():
    """Of groups at one place a few are numbered; far ones all are."""
    figure = lambda x: Figure(x, "", 9, 0)
    near = [
        GroupFinding(k, None, {"nce_loss": figure(1.38), "ess_share": figure(0.9)}, "no hole")
        for k in range(100, 110)
    ]
    far = [
        GroupFinding(k, None, {"nce_loss": figure(0.3 * k), "ess_share": figure(0.1**k)}, "hole")
        for k in (1, 2, 3)
    ]
    svg = group_plots.ess_by_loss([*near, *far]).svg
    numbers = [int(n) for n in re.findall(r">(\d+)</text>", svg)]
    assert {1, 2, 3} <= {*numbers} and 1 <= sum(n >= 101 for n in numbers) <= 4


def test_losses_of_every_part_are_drawn():
    rows = [{"step": s, "heldout_loss": 1.0, "heldout_loss_0": 1.0 / s} for s in (1, 2)]
    one = plots.nce_of_groups([rows]).svg
    two = plots.nce_of_groups([rows, [{"step": s, "heldout_loss": 0.5} for s in (1, 2)]]).svg
    assert two.count("var(--ncp)") == one.count("var(--ncp)") + 1


def test_card_counts_groups_with_a_hole():
    gain = {"mmd_gain": Figure(0.1, "MMD^2", 9, 0, 0.01)}
    words_of = ["mended", "improved", "unreliable", "no hole", "inactive", "not fitted"]
    of = [GroupFinding(k, None, gain, word) for k, word in enumerate(words_of)]
    (card,) = words.cards({}, of)
    assert card.value == "1 of 3" and card.share == pytest.approx(1 / 3)
    (card,) = words.cards({}, of[3:])
    assert card.value == "–"
