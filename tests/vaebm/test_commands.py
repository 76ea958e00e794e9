"""`ncprior energy` and what takes its result, on a small run."""

import json
import sys

import numpy as np
import pytest

from ncprior import cli
from ncprior.pipeline import fit_run, load_energy, train_run
from ncprior.recipes import load_recipe
from ncprior.runs import Run

SMALL = """
[data]
source = "digits"

[vae]
preset = "digits"

[train]
steps = 40
tensorboard = false
device = "cpu"

[fit]
steps = 20
evaluate_every = 20
log_z_draws = 0
tensorboard = false
device = "cpu"
network_options = { width = 16, members = 2 }

[energy]
network = "mlp"
network_options = { hidden = [16] }
steps = 20
langevin_steps = 3
starts = 60
proposals = 10
heldout_draws = 60
evaluate_every = 10
tensorboard = false
device = "cpu"
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp("energy")
    (place / "small.toml").write_text(SMALL)
    run = train_run(load_recipe(place / "small.toml"), place / "run", progress=False)
    fit_run(run, progress=False)
    return run.path


def command(capsys, *arguments):
    """(exit code, standard output, standard error) of a command."""
    old = sys.argv
    sys.argv = ["ncprior", *map(str, arguments)]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        sys.argv = old
    return stop.value.code, *capsys.readouterr()


def test_the_whole_way(capsys, trained, tmp_path):
    code, _, err = command(capsys, "sample", trained, "--energy", "--out", tmp_path / "a.npz")
    assert code == 2 and "holds no energy on ncp yet" in err and "ncprior energy" in err
    for prior in ("base", "ncp"):
        code, text, _ = command(capsys, "energy", trained, "--prior", prior, "--json")
        found = json.loads(text)
        assert code == 0 and found["heldout_fd"] > 0 and found["best_step"] in (10, 20)
    assert not list(trained.glob("energy-*-checkpoint.pt"))
    code, _, err = command(capsys, "energy", trained)
    assert code == 2 and "--overwrite" in err
    code, text, _ = command(capsys, "energy", trained, "--resume", "--json")  # it is done
    assert code == 0 and json.loads(text)["heldout_fd"] == found["heldout_fd"]
    code, text, _ = command(
        capsys, "sample", trained, "--energy", "--num", 5, "--proposals", 10, "--out",
        tmp_path / "a.npz", "--json",
    )  # fmt: skip
    arrays = np.load(tmp_path / "a.npz")
    assert code == 0 and arrays["images"].shape == (5, 1, 8, 8) and arrays["latents"].any()
    code, text, _ = command(
        capsys, "evaluate", trained, "--priors", "base,base+energy,ncp,ncp+energy", "--metrics",
        "fd,nll", "--samples", 60, "--proposals", 10, "--images", 3, "--importance-samples", 2,
        "--log-z-draws", 50, "--json",
    )  # fmt: skip
    scores = json.loads(text)
    assert code == 0
    names = {"base", "base+energy", "ncp", "ncp+energy", "reconstruction"}
    assert len({scores[f"fd_{name}"] for name in names}) == 5
    assert "nll_ncp" in scores and "nll_ncp+energy" not in scores


def test_energy_of_an_older_prior(trained):
    run = Run.open(trained)
    fit_run(run, seed=1, overwrite=True, progress=False)
    with pytest.raises(ValueError, match=r"fitted on another prior .* --prior ncp --overwrite"):
        load_energy(run, "ncp")
    load_energy(run, "base")
