"""Groups fitted by several processes that never talk to each other."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ncprior
from ncprior.pipeline import fit_run
from ncprior.runs import Run
from ncprior.shares import Parts, process_place, share_of

pytestmark = pytest.mark.filterwarnings("ignore:Reconstructions are no nearer")  # untrained

HERE = Path(__file__).resolve().parent
FIT = {"preset": "groups-small", "steps": 12, "batch_size": 8, "evaluate_every": 4, "patience": 99}
FIT |= {"checkpoint_every": 5, "network_options": {"width": 4}, "tensorboard": False}


@pytest.mark.parametrize(("count", "sizes"), [(1, [5]), (2, [2, 3]), (5, [1] * 5)])
def test_shares_cover_all_groups_once(count, sizes):
    shares = [share_of(range(5), i, count) for i in range(count)]
    assert [len(share) for share in shares] == sizes
    assert sorted(k for share in shares for k in share) == list(range(5))


def test_more_processes_than_groups():
    with pytest.raises(ValueError, match="3 processes for 2 latent groups"):
        share_of(range(2), 0, 3)


def test_who_this_process_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    assert process_place() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "3")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert process_place() == (3, 4)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert process_place() == (1, 2)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A run whose NVAE of three groups nobody trained."""
    path = tmp_path_factory.mktemp("shares") / "run"
    sizes = {"groups_per_scale": [3], "encoder_channels": 2, "decoder_channels": 2}
    vae = {"preset": "nvae-digits", "latent_channels": 2, **sizes}
    run = Run.create(path, {"data": {"source": "digits"}, "vae": vae, "fit": FIT})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run.save_vae(ncprior.build_vae((1, 8, 8), **vae))
    run.load_data()
    return run


@pytest.fixture
def run(fresh, tmp_path):
    return Run.open(Path(shutil.copytree(fresh.path, tmp_path / "run")))


def weights(run):
    return run.load_prior(run.load_vae()).state_dict()


def same(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def job(run, rank, step=None):
    paths = [str(HERE), str(HERE.parent / "src")]
    threads = str(torch.get_num_threads())
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": threads}
    command = [sys.executable, str(HERE / "share_job.py"), str(run.path), str(rank), "2"]
    command += [] if step is None else [str(step)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_killed_share_that_is_resumed_gives_the_same_prior(run, tmp_path):
    """Rank 1 is killed between two checkpoints, goes on, and the parts join by themselves."""
    whole = Run.open(Path(shutil.copytree(run.path, tmp_path / "whole")))
    for groups in ("0", "1-2"):  # the shares of two processes
        fit_run(whole, groups=groups, progress=False)

    done = job(run, 0)
    assert done.returncode == 0, done.stderr
    assert run.load_prior(run.load_vae()).fitted_groups == [0]
    killed = job(run, 1, step=13)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (run.path / "ncp-1-2-checkpoint.pt").exists()
    assert Parts(run).names() == ["0"]
    again = job(run, 1)
    assert again.returncode == 0, again.stderr
    assert Parts(run).names() == ["0", "1-2"]
    assert not (run.path / "ncp-1-2-checkpoint.pt").exists()
    assert same(weights(run), weights(whole))
    record = run.load_prior(run.load_vae()).record
    assert [group is None for group in record["groups"]] == [False] * 3


@pytest.mark.slow
def test_parts_and_whole_agree(run):
    """But for rounding, which twelve steps of Adam let grow a little."""
    for groups in ("0-1", [2]):
        fit_run(run, groups=groups, progress=False)
    parts = run.load_prior(run.load_vae()).record["groups"]
    whole = fit_run(run, overwrite=True, progress=False)
    assert Parts(run).names() == []
    for a, b in zip(parts, whole.record["groups"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["kl"] == pytest.approx(b["kl"])


@pytest.mark.slow
def test_fitting_a_group_twice_needs_a_word(run):
    fit_run(run, groups="0-1", progress=False)
    before = weights(run)
    with pytest.raises(ValueError, match="holds a fitted prior of groups 0-1; pass --resume"):
        fit_run(run, groups="1-2", progress=False)
    assert fit_run(run, groups="0-1", resume=True, progress=False).fitted_groups == [0, 1]
    assert same(weights(run), before)
    fit_run(run, groups="1-2", overwrite=True, progress=False)
    assert Parts(run).names() == ["1-2"]
    with pytest.raises(ValueError, match="numbers from 0 to 2"):
        fit_run(run, groups="3", progress=False)


def test_a_prior_of_another_vae_is_refused(run):
    fit_run(run, groups="0", progress=False)
    run.save_vae(ncprior.build_vae((1, 8, 8), **run.section("vae")))
    with pytest.raises(ValueError, match="fitted on another VAE"):
        run.load_prior(run.load_vae())
