"""The reliability plot shows what was counted."""

import re

import torch

from ncprior.metrics.calibration import reliability
from ncprior.report.reliability import reliability_plot


def found(factor: float, rng: torch.Generator):
    """q = N(1, 1) and p = N(0, 1), whose log r = z - 1/2 is stated `factor` times too large."""
    at_q, at_p = torch.randn(4000, generator=rng) + 1, torch.randn(4000, generator=rng)
    return reliability(factor * (at_q - 0.5), factor * (at_p - 0.5), 10)


def test_it_says_how_far_off_the_ratios_are(rng):
    right, wrong = reliability_plot(found(1.0, rng)), reliability_plot(found(2.0, rng))
    off = [float(re.search(r"bins are (\d\.\d\d)", plot.note)[1]) for plot in (right, wrong)]
    # mean |z - 1/2| of the two laws is 0.9, and bins of 800 draws have errors of 0.07 and more
    assert off[0] < 0.2 and 0.6 < off[1] < 1.2
    assert "4,000 posterior draws" in right.note
    assert right.svg.startswith("<svg") and "predicted log-odds" in right.svg
