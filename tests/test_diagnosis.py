import math

import pytest
import torch
from toys import TwoGroups, gaussian_images, linear_vae

import ncprior
from ncprior.diagnosis import fit_summary, held_out_figures, verdict
from ncprior.figures import Figure, table
from ncprior.terminal import as_text

FIT = {"steps": 40, "evaluate_every": 20, "log_z_draws": 2000, "progress": False, "device": "cpu"}
FIT |= {"network_options": {"width": 8, "members": 2}}


@pytest.fixture(scope="module")
def diagnosed():
    """A VAE with a hole: q(z) = N(0.8, 0.6^2 I) under p = N(0, I)."""
    images, vae = gaussian_images(1500, torch.Generator().manual_seed(0)), linear_vae()
    prior = ncprior.fit_prior(vae, images, **FIT)
    return vae, images, prior, ncprior.diagnose(vae, images, prior=prior, samples=300, proposals=50)


def test_figures(diagnosed):
    _, _, prior, found = diagnosed
    figures, (group,) = found.figures, prior.record["groups"]
    assert figures["nce_loss"].value == group["loss"] and figures["jsd"].value == group["jsd"]
    assert figures["log_z"].value == prior.log_z.value and figures["log_z"].se == prior.log_z.se
    assert 1 / 50 <= figures["ess_share"].value <= 1
    assert figures["fd_base"].samples == 300
    for figure in figures.values():
        assert figure.unit and figure.samples and (figure.error() or figure.unit == "p-value")


def test_prints_as_a_table_with_a_verdict(diagnosed):
    text = str(diagnosed[3])
    for word in ("nce loss", "jsd", "fd base", "gap closed", "ess share", "The prior has a"):
        assert word in text


def test_words_come_first(diagnosed):
    """Each question is answered before the table, and none of the answers twice."""
    text = str(diagnosed[3])
    questions = [answer.question for answer in diagnosed[3].answers]
    places = [text.index(question) for question in questions]
    assert places == sorted(places) and places[0] == 0
    assert places[-1] < text.index("nce loss") and text.count("The prior has a") == 1
    assert questions[0] == "How large is the hole?" and len(questions) == 6


def test_latents_of_a_flat_vae_are_compared(diagnosed):
    """q(z) = N(0.8, 0.6^2 I): a classifier of test images' latents has to see it."""
    vae, images, prior, found = diagnosed
    figures = found.figures
    assert figures["c2st_base_p"].value < 0.01 and figures["mmd_base_p"].value < 0.01
    assert figures["c2st_base"].value > 0.6
    low, high = figures["jsd"].interval
    assert low - 4 * figures["jsd_test"].se < figures["jsd_test"].value < high + 0.1
    assert figures["ess"].value / figures["ess_share"].value == pytest.approx(50)
    options = {"samples": 40, "proposals": 10, "latent_metrics": ()}
    without = ncprior.diagnose(vae, images, prior=prior, **options)
    assert not any(name.startswith(("mmd", "c2st", "swd")) for name in without.figures)


def test_the_same_seed_says_the_same(diagnosed):
    vae, images, prior, found = diagnosed
    again = ncprior.diagnose(vae, images, prior=prior, samples=300, proposals=50)
    assert again.figures == found.figures


def test_langevin_has_no_pool(diagnosed):
    vae, images, prior, _ = diagnosed
    found = ncprior.diagnose(vae, images, prior=prior, samples=40, sampler="langevin")
    assert "ess_share" not in found.figures


def test_small_pools_are_warned_of(diagnosed):
    vae, images, prior, _ = diagnosed
    found = ncprior.diagnose(vae, images, prior=prior, samples=40, proposals=2)
    assert any("fewer than 3 effective proposals" in warning for warning in found.warnings)


def figures(jsd, base, reconstruction, closed):
    return {
        "jsd": Figure(jsd, "nats", 1, 0),
        "fd_base": Figure(base, "squared", 1, 0, 0.1),
        "fd_reconstruction": Figure(reconstruction, "squared", 1, 0, 0.1),
        "gap_closed": Figure(closed, "share", 1, 0, 0.05),
    }


@pytest.mark.parametrize(
    ("jsd", "base", "words"),
    [
        (0.001, 1.05, ["hardly any hole", "next to nothing to win"]),
        (0.05, 3.0, ["a small hole", "from 3.000 to 1.000", "closes 60 % (± 5)"]),
        (0.4, 3.0, ["a large hole", "JSD 0.400 of at most 0.693"]),
    ],
)
def test_verdict(jsd, base, words):
    found = verdict(figures(jsd, base, 1.0, 0.6))
    assert all(word in found for word in words)


def test_log_z_far_from_zero_is_warned_of(diagnosed):
    vae, images, prior, _ = diagnosed
    try:
        kept = prior.log_z
        prior.log_z = kept._replace(value=-3.0)
        found = ncprior.diagnose(vae, images, prior=prior, samples=40, proposals=20)
    finally:
        prior.log_z = kept
    assert any("log Z is -3.00, far from 0" in warning for warning in found.warnings)


GROUPS = {"samples": 60, "proposals": 30, "group_samples": 250, "group_proposals": 40}


@pytest.fixture(scope="module")
def hierarchical():
    """z1 of the posterior is far too narrow; z2 given z1 has a hole that the classifiers miss.

    The images vary less than the decoder supposes (0.36 for 0.47), so that posterior means of z2
    do as well. After 120 steps the JSD is still 0.001; the witness sees it.
    """
    vae = TwoGroups(widen=0.5)
    noise = torch.randn(2500, 1, 1, 3, generator=torch.Generator().manual_seed(0))
    images = (0.5 + 0.4 * noise).clamp(0, 1)
    options = FIT | {"steps": 120, "evaluate_every": 60, "preset": "small", "log_z_draws": 0}
    prior = ncprior.fit_prior(vae, images, **options)
    return vae, images, prior, ncprior.diagnose(vae, images, prior=prior, **GROUPS)


def test_each_group_has_figures_and_a_line(hierarchical):
    _, _, prior, found = hierarchical
    figures = found.figures
    for k, group in enumerate(prior.record["groups"]):
        for name, of_record in (("nce_loss", "loss"), ("jsd", "jsd"), ("kl", "kl")):
            assert figures[f"{name}_{k}"].value == group[of_record]
        for name in ("ess", "ess_share", "mmd_base", "mmd_ncp", "mmd_gain", "gap_base", "gap_ncp"):
            assert figures[f"{name}_{k}"].error()
        assert figures[f"mmd_base_{k}"].samples == 250
        assert figures[f"ess_share_{k}"].samples == 60  # the pools of what was drawn
    assert [f.group for f in found.groups] == [0, 1]
    assert found.groups[0].word == "mended" and found.groups[1].word == "improved"
    gaps = [figures[f"gap_{name}_1"] for name in ("base", "ncp")]
    assert all(gap.value > 4 * gap.se for gap in gaps)


def test_totals_over_groups(hierarchical):
    _, _, prior, found = hierarchical
    figures = found.figures
    assert figures["kl"].value == pytest.approx(sum(g["kl"] for g in prior.record["groups"]))
    shares = [figures[f"ess_share_{k}"].value for k in (0, 1)]
    assert figures["ess_share"].value == pytest.approx(sum(shares) / 2)


def test_several_groups_print_as_two_tables(hierarchical):
    text = str(hierarchical[3])
    assert "gap closed" in text and "q to NCP" in text and "improved" in text
    assert "jsd 0" not in text and "nats in group 0, the largest)" in text
    assert "Mended: group 0. Improved: group 1." in " ".join(text.split())


def test_groups_that_keep_their_base(hierarchical):
    """They are compared all the same; only what is drawn changes."""
    vae, images, prior, whole = hierarchical
    found = ncprior.diagnose(vae, images, prior=prior, groups="1", **GROUPS)
    for k, other in ((0, "given posterior draws"), (1, "SIR's pools of 30")):
        assert other in found.figures[f"ess_share_{k}"].note
        for name in ("mmd_base", "mmd_ncp"):
            assert found.figures[f"{name}_{k}"] == whole.figures[f"{name}_{k}"]
    assert found.figures["ess_share"].value == found.figures["ess_share_1"].value
    with pytest.raises(ValueError, match="groups must be numbers from 0 to 1"):
        ncprior.diagnose(vae, images, prior=prior, groups="2", **GROUPS)


def test_without_a_comparison_of_groups(hierarchical):
    vae, images, prior, _ = hierarchical
    found = ncprior.diagnose(vae, images, prior=prior, **GROUPS | {"group_samples": 0})
    assert not any(name.startswith(("mmd", "gap_base")) for name in found.figures)
    assert [f.word for f in found.groups] == ["hole", "no hole"] and "q to NCP" not in str(found)


def test_options_are_those_of_draw(hierarchical, monkeypatch):
    vae, images, prior, _ = hierarchical
    options = GROUPS | {"sampler": "langevin", "group_samples": 0}
    found = ncprior.diagnose(vae, images, prior=prior, steps=2, **options)
    assert "ess_share" not in found.figures
    with pytest.raises(TypeError, match="step_sizes"):
        ncprior.diagnose(vae, None, step_sizes=0.1)  # before anything is read or fitted
    monkeypatch.setattr("ncprior.diagnosis.fit_prior", None)
    with pytest.raises(ValueError, match="got 'incepton'"):
        ncprior.diagnose(vae, images, features="incepton")  # before anything is fitted
    with pytest.raises(ValueError, match="group_proposals at least 1, got 250 and 0"):
        ncprior.diagnose(vae, images, **GROUPS | {"group_proposals": 0})


def test_a_group_that_was_not_fitted(hierarchical):
    vae, images, prior, _ = hierarchical
    part = prior.only([1])
    part.record = prior.record | {"groups": [None, prior.record["groups"][1]]}
    assert {*held_out_figures(part)} == {"kl", "nce_loss_1", "jsd_1", "kl_1"}
    found = ncprior.diagnose(vae, images, prior=part, **GROUPS)
    assert [f.word for f in found.groups] == ["not fitted", "improved"]
    assert "mmd_base_0" in found.figures and "mmd_ncp_0" not in found.figures
    assert found.figures["kl"].note == "held out, sum over 1 of 2 groups"
    assert math.isfinite(found.figures["ess_share"].value)
    assert "Not fitted: group 0." in fit_summary(part)


def test_summary_of_a_fit(diagnosed, hierarchical):
    flat, several = diagnosed[2], hierarchical[2]
    assert fit_summary(flat) == as_text(table(held_out_figures(flat)))
    text = fit_summary(several)
    assert "Hole: group 0. No hole: group 1." in text and "q to NCP" not in text
    share = several.record["groups"][0]["ess_share"]
    assert f"{100 * share:.1f} %" in text
