import re

import pytest
import torch

from ncprior.group_samples import GroupSamples
from ncprior.report.latent_plots import POINTS, plane

from .test_build import Reader


def dots(svg):
    return svg.count("<use ")


@pytest.mark.parametrize("size", [1, 2, 30])
def test_two_panels_in_the_colours_of_the_page(rng, size):
    q, base, ncp = (torch.randn(40, size, generator=rng) for _ in range(3))
    found = plane(GroupSamples(q, base, ncp, None))
    assert "var(--reconstruction)" in found.svg and "var(--ncp)" in found.svg
    assert not re.findall(r"(?:fill|stroke): *(#[0-9a-f]{3,6})", found.svg)
    Reader().feed(found.svg)
    without = plane(GroupSamples(q, base, None, None))
    assert dots(found.svg) - dots(without.svg) == 40  # of the NCP


def test_long_sets_are_cut(rng):
    few, many = (
        plane(GroupSamples(*(torch.randn(n, 3, generator=rng) for _ in range(3)), None))
        for n in (POINTS, 4 * POINTS)
    )
    assert abs(dots(few.svg) - dots(many.svg)) < 20  # but for ticks


def test_components_are_those_of_the_posterior(rng):
    """Of 30 numbers two carry nearly everything, and the note says how much."""
    scale = torch.tensor([3.0, 2.0] + 28 * [0.1])
    q = scale * torch.randn(400, 30, generator=rng)
    found = plane(GroupSamples(q, q, q, None))
    share = (9 + 4) / (9 + 4 + 28 * 0.01)
    said = float(re.search(r"\((\d+) % of their variance", found.note)[1])
    assert abs(said - 100 * share) < 2
