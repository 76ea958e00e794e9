"""The digits version of the hierarchical story, through the jobs behind the commands."""

import math
from pathlib import Path

import pytest

from ncprior.pipeline import diagnose_run, fit_run, train_run
from ncprior.recipes import load_recipe

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "digits-nvae.toml"


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ncp_lowers_the_frechet_distance_by_a_third(seed, tmp_path):
    """30 % at least, and beyond two standard errors, over the base prior of an NVAE."""
    recipe = load_recipe(RECIPE)
    for section in ("data", "train", "fit", "diagnose"):
        recipe[section]["seed"] = seed
    run = train_run(recipe, tmp_path / "run", progress=False)
    fit_run(run, progress=False)
    figures = diagnose_run(run, progress=False).figures
    base, ncp = figures["fd_base"], figures["fd_ncp"]
    assert ncp.value < 0.7 * base.value
    assert base.value - ncp.value > 2 * math.hypot(base.se, ncp.se)
