"""Plots as SVG that can stand together in one page."""

import re

import matplotlib
import pytest

from ncprior.report import plots
from ncprior.report.facts import read_curves

HISTORY = [{"step": s, "elbo": -9.0 / s, "validation_elbo": -8.0 / s, "kl": 2.0} for s in (1, 5, 9)]
NCE = [{"step": s, "train_loss": 1 / s, "heldout_loss": 1.1 / s} for s in (1, 2, 3)]
GROUP = {
    "histogram": {"edges": [-1.0, 0.0, 1.0], "q": [0.3, 0.7], "p": [0.6, 0.4]},
    "temperature": 1.1,
    "shift": -0.25,
}


def all_plots():
    groups = [
        plot for k in (0, 1) for plot in (plots.log_ratios(GROUP, k), plots.ess([1, 3], 9, k))
    ]
    return [plots.elbo(HISTORY), plots.kl(HISTORY), plots.nce(NCE, 2), *groups]


def test_ids_are_unique_and_references_lead_somewhere():
    text = "".join(plot.svg for plot in all_plots())
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', text)) <= set(ids)


def test_colours_are_those_of_the_page():
    for plot in all_plots():
        assert plot.svg.count("<svg") == plot.svg.count("</svg>") == 1
        assert "var(--" in plot.svg
        painted = re.findall(r"(?:fill|stroke): *(#[0-9a-f]{3,6})", plot.svg)
        assert not painted, plot.title


def test_words_around_the_plots():
    ratios, ess = plots.log_ratios(GROUP), plots.ess([1.0, 3.0], 100)
    assert "temperature 1.100" in ratios.note and "shift −0.250" in ratios.note
    assert "2.0 of 100 proposals count, 2 %" in ess.note
    assert "group" not in ratios.title and "group 1" in plots.log_ratios(GROUP, 1).title
    assert any("step 2" in label for label, _, _ in plots.nce(NCE, 2).keys)
    assert len(plots.nce(NCE, None).keys) == 3


def test_matplotlib_is_left_as_it_was():
    before = dict(matplotlib.rcParams)
    plots.kl(HISTORY)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("text", ["", "step,kl\n", "step,kl\n1,nan\n,3\n2\nx,y,z\n"])
def test_damaged_logs_leave_only_what_is_whole(tmp_path, text):
    file = tmp_path / "vae.csv"
    assert read_curves(file) == []
    file.write_text(text)
    assert all(row.keys() <= {"step", "kl"} and "step" in row for row in read_curves(file))
    plots_of = [row for row in read_curves(file) if "kl" in row]
    assert plots_of == []
