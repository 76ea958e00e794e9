"""What is said rests on the figures: each rule at both of its sides."""

import pytest

import ncprior
from ncprior.answers import Answer, answers, as_paragraphs
from ncprior.figures import Figure
from ncprior.group_findings import GroupFinding
from ncprior.normal import StandardNormal
from ncprior.numerics import LogZ
from ncprior.ratios import MLPRatio, SummedRatio, UnitRatio

GOOD = {"loss": 0.9, "train_loss": 0.88, "jsd": 0.24, "kl": 5.0, "ess_share": 0.1}
GOOD |= {"jsd_interval": (0.2, 0.3)}
Z = LogZ(0.02, 0.01, 20_000.0, 200_000)


THIRTY = ncprior.GaussianMixture(30, 2)  # of which no mixture is known to be better


def prior_of(*groups, log_z=Z, base=None):
    prior = ncprior.NoiseContrastivePrior([UnitRatio() for _ in groups], base, log_z=log_z)
    prior.record = {"groups": list(groups)}
    return prior


def figures(**changes):
    found = {
        "jsd": Figure(0.24, "nats", 200, 0, interval=(0.2, 0.3)),
        "jsd_test": Figure(0.231, "nats", 200, 0, 0.01),
        "log_z": Figure(Z.value, "nats", Z.num, 0, Z.se),
        "ess": Figure(100.0, "proposals", 500, 0, 1.0),
        "ess_share": Figure(0.1, "of proposals", 500, 0, 0.001),
        "c2st_base": Figure(0.8, "accuracy", 200, 0, 0.02),
        "c2st_ncp": Figure(0.51, "accuracy", 200, 0, 0.02),
        "c2st_ncp_p": Figure(0.3, "p-value", 200, 0),
        "fd_base": Figure(3.0, "squared, pixels", 500, 0, 0.03),
        "fd_ncp": Figure(1.8, "squared, pixels", 500, 0, 0.03),
        "fd_reconstruction": Figure(1.0, "squared, pixels", 500, 0, 0.04),
        "gap_closed": Figure(0.6, "share", 500, 0, 0.05),
        "fd_gain_over_base": Figure(1.2, "squared, pixels", 500, 0, 0.1),
    }
    for name, value in changes.items():
        found[name] = found[name]._replace(value=value)
    return found


def said(prior=None, figures_=None, findings=(), run="RUN"):
    found = answers(prior or prior_of(GOOD), figures_ or figures(), findings, run)
    return {answer.question: answer.text for answer in found}


def test_a_good_prior():
    found = said()
    assert list(found) == [
        "How large is the hole?", "Where is it?", "What can be won at most?",
        "Can the ratios be trusted?", "How many proposals are needed?", "What next?",
    ]  # fmt: skip
    size = found["How large is the hole?"]
    assert "JSD 0.240 of at most 0.693" in size and "On test images it is 0.231 ± 0.01" in size
    assert "accuracy of 80 ± 2 %" in size
    won = found["What can be won at most?"]
    assert "from 3.000 to 1.000, by 2.000 ± 0.05" in won and "60 % (± 5)" in won
    trust = found["Can the ratios be trusted?"]
    assert trust.startswith("Yes. For:") and "average to 1 under the base" in trust
    assert "does not tell" in trust and "51 ± 2 % on 200 test images" in trust
    assert found["What next?"] == (
        "A base nearer to the posterior may close more: ncprior fit RUN --base mixture-auto "
        "--overwrite. Sample: ncprior sample RUN --out samples.npz."
    )


@pytest.mark.parametrize(
    ("prior", "changes", "word", "reason"),
    [
        (prior_of(GOOD | {"train_loss": 0.7}), {}, "With care.", "over-fits (loss 0.700"),
        (prior_of(GOOD), {"log_z": -0.36}, "With care.", "average to 0.7 under the base"),
        (
            prior_of(GOOD),
            {"c2st_ncp": 0.6, "c2st_ncp_p": 1e-4},
            "With care.",
            "accuracy of 60 ± 2 % (base: 80 ± 2 %)",
        ),
        (prior_of(GOOD, log_z=Z._replace(k_hat=0.8)), {}, "With care.", "0.80, above 0.7"),
        (prior_of(GOOD, log_z=Z._replace(k_hat=1.2)), {}, "No.", "k-hat"),
        (prior_of(GOOD | {"jsd": 0.69}), {}, "No.", "hardly overlap"),
    ],
)
def test_reasons_against_the_ratios(prior, changes, word, reason):
    found = said(prior, figures(**changes))["Can the ratios be trusted?"]
    assert found.startswith(f"{word} Against:") and reason in found


def test_proposals():
    """10 effective ones of a share of 0.1 are 100; pools of 1000 are off by 1 / (1000 * 0.1)."""
    found = said()["How many proposals are needed?"]
    assert "About 100 for 10 effective ones: 10 % count" in found
    assert "pools of 1,000 hold 100.0" in found and "up to 1 %" in found
    # Of few proposals a larger share counts than of many: what many need is told by log Z's.
    few = figures(ess=4.0, ess_share=0.04, gap_closed=0.95)
    prior = prior_of(GOOD, log_z=Z._replace(ess=2000.0))
    found = said(prior, few)
    assert "About 1,000 for 10 effective ones" in found["How many proposals are needed?"]
    assert "hold 4.0" in found["How many proposals are needed?"]
    assert "up to 100 %" in found["How many proposals are needed?"]
    assert "takes 1,000 (--proposals auto)" in found["How many proposals are needed?"]  # 99 / 0.105
    assert "Few proposals count: fit on a nearer base" in found["What next?"]
    prior.log_z, few = Z._replace(ess=200.0), figures(ess=4.0, ess_share=0.04)
    assert "draw with --proposals 10000" in said(prior, few)["What next?"]
    left = said(prior, figures(ess=4.0, ess_share=0.04))["What next?"]  # which asks for one already
    assert left.count("--base mixture-auto") == 1 and "count: draw with --proposals 10000." in left


def test_shares_of_small_pools_flatter():
    """What many draws say comes first, and the pools' own share is said to be one."""
    prior = prior_of(GOOD, log_z=Z._replace(ess=400.0))
    found = said(prior, figures(ess=9.0, ess_share=0.09))["How many proposals are needed?"]
    assert "0.2 % count among many" in found and "know little of ratios" in found
    found = said(prior, figures(ess=0.3, ess_share=0.003))["How many proposals are needed?"]
    assert "0.2 % count on average" in found and "know little" not in found


def test_no_more_proposals_where_nothing_is_left():
    prior = prior_of(GOOD, log_z=Z._replace(ess=400.0))
    for closed, advised in ((0.95, False), (0.5, True)):
        few = figures(ess=4.0, ess_share=0.04, gap_closed=closed)
        assert ("draw with --proposals" in said(prior, few)["What next?"]) is advised


def test_no_number_of_proposals_where_all_is_separated():
    prior = prior_of(GOOD | {"jsd": 0.69})
    found = said(prior, figures(ess=87.0, ess_share=0.87))["How many proposals are needed?"]
    assert found.startswith("No number will do")
    prior.ratios[0] = SummedRatio([MLPRatio(2)])  # stages are for such, and take no proposals
    without = {k: v for k, v in figures().items() if not k.startswith("ess")}
    assert "How many proposals are needed?" not in said(prior, without)


@pytest.mark.parametrize("ess", [4.0, 40.0])
def test_a_nearer_base_where_few_proposals_of_a_normal_one_count(ess):
    few, prior = figures(ess=ess, ess_share=ess / 100), prior_of(GOOD)
    ten, thirty = ncprior.GaussianMixture(10, 2), ncprior.GaussianMixture(30, 2)
    for base, known in ((StandardNormal(2), True), (ten, True), (thirty, False)):
        prior.base = base
        found = said(prior, few | {"gap_closed": Figure(0.95, "share", 500, 0, 0.05)})["What next?"]
        assert ("--base mixture-auto --overwrite" in found) == (known and ess < 10)
        found = said(prior, few)["What next?"]
        assert ("A base nearer to the posterior may close more" in found) == known
    prior.base, prior.record["base"] = ten, "mixture-auto"  # which chose ten
    assert "--base" not in said(prior, few)["What next?"]


def test_stages_where_a_mixture_was_not_near_enough():
    prior = prior_of(GOOD | {"jsd": 0.69})
    prior.base = ncprior.GaussianMixture(30, 2)
    found = said(prior)["What next?"]
    assert "--stages adaptive" in found and "--base" not in found


@pytest.mark.parametrize(
    ("prior", "changes", "advice", "sample"),
    [
        (prior_of(GOOD), {"fd_base": 1.05}, "train a better VAE", False),
        (prior_of(GOOD | {"jsd": 0.69}), {}, "Fit on a base nearer to the posterior", True),
        (prior_of(GOOD | {"train_loss": 0.7}, base=THIRTY), {}, "more dropout", True),
        (
            prior_of(GOOD, base=THIRTY),
            {"c2st_ncp": 0.6, "c2st_ncp_p": 1e-4},
            "--preset near",
            True,
        ),
        (prior_of(GOOD), {"gap_closed": 0.95}, "little left to win", True),
        (prior_of(GOOD), {"fd_gain_over_base": -0.3}, "Do not use this prior", False),
    ],
)
def test_what_next(prior, changes, advice, sample):
    found = said(prior, figures(**changes))["What next?"]
    assert advice in found and ("Sample: ncprior sample" in found) == sample
    assert advice not in said()["What next?"]


@pytest.mark.parametrize("closed", [0.6, 0.95])
@pytest.mark.parametrize(("batch", "advice"), [(512, "--preset near"), (2048, "--steps 600")])
def test_a_classifier_that_never_got_going(closed, batch, advice):
    """It says that there is no hole, and a fresh one knows better."""
    prior = prior_of(GOOD | {"jsd": 0.001}, base=THIRTY)
    prior.record["settings"] = {"steps": 300, "batch_size": batch}
    missed = figures(c2st_ncp=0.6, c2st_ncp_p=1e-4, gap_closed=closed)
    del missed["fd_gain_over_base"]
    found = said(prior, missed)["What next?"]
    assert f"next to nothing, though a fresh one does: ncprior fit RUN {advice} --ov" in found
    assert "little left" not in found
    assert "a fresh one" not in said(prior)["What next?"]  # nothing left to find


def test_the_gap_is_that_of_the_vae_prior_where_the_base_is_another():
    """The base is a fitted one: what it closes alone stands beside what the NCP closes on it."""
    more = {
        "fd_vae_prior": Figure(9.0, "squared, pixels", 500, 0, 0.03),
        "gap_closed_base": Figure(0.75, "share", 500, 0, 0.01),
        "c2st_vae_prior": Figure(0.97, "accuracy", 200, 0, 0.01),
    }
    found = said(figures_=figures(gap_closed=0.9) | more)
    size = found["How large is the hole?"]
    assert "a base that was fitted first, not on the VAE's own prior; it has a large hole" in size
    assert "from samples of the VAE's own prior with an accuracy of 97 ± 1 %, from those" in size
    assert "those of the base with 80 ± 2 %, where chance" in size
    won = found["What can be won at most?"]
    assert "from 9.000, that of the VAE's own prior, to 1.000, by 8.000 ± 0.05" in won
    assert "closes 90 % (± 5) of that gap, its base alone 75 % (± 1)." in won
    # No gap from a base that is as near as reconstructions is no reason to train another VAE.
    assert "better VAE" not in said(figures_=figures(fd_base=1.05) | more)["What next?"]


@pytest.mark.parametrize(
    ("won", "advice"),
    [(-0.3, "Do not use this prior"), (0.15, "no nearer to the data than its base's"), (0.3, "")],
)
def test_samples_are_compared_with_those_of_the_base(won, advice):
    found = said(figures_=figures(fd_gain_over_base=won))["What next?"]
    assert advice in found and ("Sample: " in found) == (won == 0.3)
    assert ("sample RUN --prior base" in found) == (won == 0.15)
    # Without a gap the sign of its share says nothing.
    none = said(figures_=figures(fd_base=1.05, gap_closed=-5.0, fd_gain_over_base=won))
    assert ("Do not use this prior" in none["What next?"]) == (won < 0)


def test_a_combination_is_not_told_to_fit_again():
    prior = prior_of(GOOD | {"train_loss": 0.5}, base=ncprior.GaussianMixture(10, 2))
    assert "mixture-auto" in said(prior)["What next?"]
    prior.record["combined"] = []
    few = figures(ess=4.0, ess_share=0.04, c2st_ncp=0.6, c2st_ncp_p=1e-4)
    for found in (said(prior), said(prior, few)):
        assert "fit" not in found["What next?"]


def of_groups():
    figures_ = {
        f"{name}_{k}": Figure(value, unit, 100, 0, 0.1)
        for k, jsd, ess in ((0, 0.3, 40.0), (1, 0.05, 5.0), (2, 0.001, 99.0))
        for name, value, unit in (
            ("jsd", jsd, "nats"), ("ess", ess, "proposals"), ("ess_share", ess / 100, ""),
        )
    }  # fmt: skip
    words = ["mended", "unreliable", "no hole"]
    findings = [
        GroupFinding(k, None, {n: figures_[f"{n}_{k}"] for n in ("jsd", "ess", "ess_share")}, word)
        for k, word in enumerate(words)
    ]
    return figures_, findings


def test_several_groups():
    figures_, findings = of_groups()
    prior = prior_of(GOOD, GOOD | {"train_loss": 0.5}, GOOD, log_z=None)
    found = said(prior, figures_, findings)
    where = found["Where is it?"]
    assert where.startswith("2 of 3 groups have one: groups 0-1. The largest: 0 (JSD 0.300), 1")
    assert "Mended: group 0." in where
    trust = found["Can the ratios be trusted?"]
    assert trust.startswith("With care.") and "most in group 1" in trust
    assert "group 1: unreliable" in trust
    pools = found["How many proposals are needed?"]
    assert "in group 1, which needs the most" in pools and "About 200 for" in pools
    assert "What can be won at most?" not in found  # nothing was measured of it


def test_no_group_with_a_hole():
    figures_, findings = of_groups()
    found = said(prior_of(GOOD, GOOD, GOOD), figures_, findings[2:])
    assert found["Where is it?"].startswith("In no group that could be seen.")


def test_what_is_not_known_is_not_said():
    found = said(figures_={"jsd": figures()["jsd"]}, run="'my run'")
    assert list(found) == [
        "How large is the hole?", "Where is it?", "Can the ratios be trusted?", "What next?",
    ]  # fmt: skip
    assert found["What next?"] == "Sample: ncprior sample 'my run' --out samples.npz."
    assert "classifier" not in found["How large is the hole?"]


def test_paragraphs_are_wrapped():
    text = as_paragraphs([Answer("Why?", "so " * 60), Answer("And?", "no")], width=40)
    lines = text.splitlines()
    assert lines[0] == "Why?" and lines[-2:] == ["And?", "  no"]
    assert all(len(line) <= 40 for line in lines) and lines[1].startswith("  so")
