"""The word on a group, the table of all, and warnings that are told once."""

import pytest

from ncprior.figures import Figure
from ncprior.group_findings import (
    WORDS,
    GroupFinding,
    group_findings,
    group_table,
    inactive_note,
    judge,
    merged_warnings,
    words_in_short,
)
from ncprior.priors import NoiseContrastivePrior
from ncprior.ratios import NETWORKS, UnitRatio
from ncprior.terminal import as_text

HOLE = {"kl": 5.0, "jsd": 0.2, "jsd_interval": [0.17, 0.23], "loss": 1.0, "train_loss": 0.95}
HOLE |= {"loss_interval": [0.98, 1.02], "ess_share": 0.2}
QUIET = {"jsd": 0.004, "jsd_interval": [0.001, 0.008]}
VAGUE = {"jsd": 0.04, "jsd_interval": [-0.01, 0.09]}


def mmds(base, ncp, se=0.01):
    """Figures of MMDs with equal errors."""
    values = {"mmd_base": base, "mmd_ncp": ncp, "mmd_gain": base - ncp}
    return {name: Figure(value, "MMD^2", 100, 0, se) for name, value in values.items()}


def gaps(base, ncp, se=0.01):
    """Figures of witnesses with equal errors."""
    values = {"gap_base": base, "gap_ncp": ncp, "gap_gain": base - abs(ncp)}
    return {name: Figure(value, "s.d.", 100, 0, se) for name, value in values.items()}


def ess(size):
    return {"ess": Figure(size, "proposals", 100, 0)}


@pytest.mark.parametrize(
    ("change", "measured", "word"),
    [
        (None, mmds(0.3, 0.1), "not fitted"),
        ({"kl": 0.009}, mmds(0.3, 0.1), "inactive"),
        ({"kl": 0.009, "jsd": 0.69}, {}, "inactive"),
        ({"jsd": 0.69}, mmds(0.3, 0.1), "unreliable"),
        ({"train_loss": 0.69}, mmds(0.3, 0.1), "unreliable"),
        ({}, ess(2.9) | mmds(0.3, 0.1), "unreliable"),
        ({"ess_share": 0.0029}, {}, "unreliable"),
        ({"ess_share": 0.0029}, ess(30.0), "hole"),  # measured pools count for more
        ({}, {}, "hole"),
        (QUIET, {}, "no hole"),
        (VAGUE, {}, "unclear"),
        ({}, mmds(0.3, 0.14), "mended"),
        ({}, mmds(0.3, 0.16), "improved"),
        ({}, mmds(0.3, 0.29), "unchanged"),
        (QUIET, mmds(0.3, 0.29), "unchanged"),  # a hole that the classifier missed
        ({}, mmds(0.3, 0.33), "worse"),
        ({}, mmds(0.03, 0.015), "unclear"),
        (QUIET, mmds(0.01, 0.005), "no hole"),
        (VAGUE, mmds(0.01, 0.005), "unclear"),
        ({}, gaps(0.3, 0.14), "mended"),
        ({}, gaps(0.3, -0.14), "mended"),
        ({}, gaps(0.3, -0.16), "improved"),  # past the posterior
        ({}, gaps(0.3, -0.3), "unchanged"),
        ({}, gaps(0.3, -0.33), "worse"),
        (QUIET, gaps(0.01, -0.01), "no hole"),
        ({}, gaps(0.3, 0.1) | mmds(0.3, 0.3), "mended"),  # the sharper measure decides
    ],
)
def test_word(change, measured, word):
    assert judge(None if change is None else HOLE | change, measured) == word
    assert word in WORDS


def prior_of(*changes):
    """A prior whose record is HOLE with these changes; None for a group that was not fitted."""
    ratios = [
        UnitRatio() if change is None else NETWORKS["mlp"](4, hidden=(2,), members=1)
        for change in changes
    ]
    prior = NoiseContrastivePrior(ratios)
    groups = [None if change is None else HOLE | change for change in changes]
    prior.record = {"groups": groups, "heldout_images": 50, "seed": 0}
    return prior


def test_warnings_of_a_kind_are_one_line():
    over = {"train_loss": 0.8}
    separated = {"jsd": 0.69, "train_loss": 0.1}  # one cause, one warning
    prior = prior_of(over, over | {"train_loss": 0.7}, {}, None, {"kl": 0.0}, separated, separated)
    findings = group_findings(prior, {"ess_6": Figure(1.5, "proposals", 10, 0)})
    lines = merged_warnings(prior, findings)
    assert [line.split(":")[0] for line in lines] == ["Groups 5-6", "Groups 0-1", "Group 6"]
    assert "separates almost perfectly (JSD up to 0.690)" in lines[0]
    assert "most in group 1: loss 0.700 on images it was fitted on, 1.000" in lines[1]
    assert "fewer than 3 effective proposals" in lines[2]
    (note,) = inactive_note(prior)
    assert note.startswith("Group 4: inactive") and "does no harm" in note


def test_a_vae_that_collapsed_altogether_is_warned_of():
    prior = prior_of({"kl": 0.0}, {"kl": 0.001})
    (line,) = merged_warnings(prior, group_findings(prior, {}))
    assert "All latent groups have collapsed" in line and inactive_note(prior) == []


def test_healthy_groups_have_no_warning():
    prior = prior_of({}, None, {})
    assert merged_warnings(prior, group_findings(prior, {})) == inactive_note(prior) == []


def test_a_ratio_that_is_left_out_is_not_fitted():
    findings = group_findings(prior_of({}, {}).only([1]), {})
    assert [f.word for f in findings] == ["not fitted", "hole"]
    assert [f.shape for f in findings] == [None, (4,)]


def a_finding(k, word="mended"):
    interval = (0.977, 1.021)
    figures = {
        "nce_loss": Figure(1.0, "nats", 10, 0, interval=interval),
        "jsd": Figure(0.19, "nats", 10, 0),
        "kl": Figure(123.456, "nats", 10, 0),
        "ess_share": Figure(0.345, "of proposals", 10, 0),
    }
    return GroupFinding(k, (20, 16, 16), figures | gaps(0.523, -0.104, 0.021), word)


def test_table_of_thirty_groups_fits_a_terminal():
    findings = [a_finding(k, "unreliable") for k in range(30)]
    text = as_text(group_table(findings))
    lines = text.splitlines()
    assert len(lines) == 3 + 30 and max(map(len, lines)) <= 100 and "…" not in text
    for cell in ("20x16x16", "123.46", "1.000 [0.977, 1.021]", "0.190", "34.5 %", "unreliable"):
        assert cell in lines[-1]
    assert "0.52 ± 0.02" in lines[-1] and "-0.10 ± 0.02" in lines[-1]


def test_table_without_gaps_or_fit():
    bare = GroupFinding(1, None, {}, "not fitted")
    first = a_finding(0)
    for name in ("gap_base", "gap_ncp", "gap_gain"):
        del first.figures[name]
    text = as_text(group_table([first, bare]))
    assert "gap" not in text and text.splitlines()[-1].split()[:2] == ["1", "-"]


def test_words_in_short():
    words = ["mended", "no hole", "mended", "mended", "unreliable"]
    findings = [GroupFinding(k, None, {}, word) for k, word in enumerate(words)]
    said = "Mended: groups 0,2-3. No hole: group 1. Unreliable: group 4."
    assert words_in_short(findings) == said
