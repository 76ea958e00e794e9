"""A run that was stopped, or killed, and resumed ends with the same weights to the bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ncprior.training.loop import Interrupted

from .jobs import STAGES, fit, train

HERE = Path(__file__).resolve()


@pytest.fixture(params=["digits", "binary"])
def kind(request):
    return request.param


@pytest.fixture
def data(kind, digits, binary_digits):
    return digits if kind == "digits" else binary_digits


@pytest.fixture(params=STAGES)
def stage(request):
    return request.param


def assert_same(found, expected):
    (weights, figures), (expected_weights, expected_figures) = found, expected
    assert figures == expected_figures
    assert weights.keys() == expected_weights.keys()
    for name, tensor in expected_weights.items():
        assert torch.equal(weights[name], tensor), name


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def checkpoint_step(directory, stage):
    return torch.load(directory / f"{stage}-checkpoint.pt", weights_only=True)["step"]


@pytest.mark.parametrize("walks", [5, 19, 27, 38])
def test_stopped_by_ctrl_c(stage, data, walks, tmp_path):
    """At any step, between checkpoints and evaluations too."""
    run = STAGES[stage]
    expected = run(*data)
    with pytest.raises(Interrupted, match=r"stopped at step .* --resume"):
        run(*data, directory=tmp_path, hook=(walks, ctrl_c))
    assert 0 < checkpoint_step(tmp_path, stage) < 40
    assert_same(run(*data, directory=tmp_path, resume=True), expected)


def test_stopped_twice(stage, data, tmp_path):
    run = STAGES[stage]
    for walks in (12, 15):
        with pytest.raises(Interrupted):
            run(*data, directory=tmp_path, resume=True, hook=(walks, ctrl_c))
    assert_same(run(*data, directory=tmp_path, resume=True), run(*data))


@pytest.mark.parametrize(
    "kind", ["binary", pytest.param("digits", marks=pytest.mark.slow)], indirect=True
)
def test_killed_between_checkpoints(stage, kind, data, tmp_path):
    """SIGKILL in a process of its own, some steps after its last checkpoint."""
    paths = [str(HERE.parents[1]), str(HERE.parents[2] / "src")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, str(HERE.parent / "jobs.py"), stage, kind, str(tmp_path), "36"]
    killed = subprocess.run(command, env=environment, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert checkpoint_step(tmp_path, stage) in (20, 30)
    run = STAGES[stage]
    assert_same(run(*data, directory=tmp_path, resume=True), run(*data))


def test_early_stopping_goes_on_where_it_was(digits, tmp_path):
    """Evaluations without improvement count across the interruption."""
    options = {"steps": 400, "evaluate_every": 4, "patience": 3, "learning_rate": 0.1}
    expected = fit(*digits, **options)
    steps = expected[1][0]["steps"]
    assert steps < 400
    with pytest.raises(Interrupted):
        fit(*digits, **options, directory=tmp_path, hook=(steps - 1, ctrl_c))
    assert checkpoint_step(tmp_path, "ncp") > steps - 12  # after the best evaluation
    assert_same(fit(*digits, **options, directory=tmp_path, resume=True), expected)


def test_resume_without_a_checkpoint_starts_anew(digits, tmp_path):
    assert_same(train(*digits, directory=tmp_path, resume=True), train(*digits))


def test_without_resume_starts_anew(digits, tmp_path):
    with pytest.raises(Interrupted):
        train(*digits, directory=tmp_path, hook=(20, ctrl_c))
    assert_same(train(*digits, directory=tmp_path), train(*digits))


def test_without_a_directory_says_that_nothing_is_kept(digits):
    with pytest.raises(Interrupted, match="nothing was kept"):
        train(*digits, hook=(5, ctrl_c))


def test_second_ctrl_c_stops_at_once(digits):
    def twice():
        ctrl_c()
        ctrl_c()

    with pytest.raises(KeyboardInterrupt) as caught:
        train(*digits, hook=(5, twice))
    assert not isinstance(caught.value, Interrupted)


def test_sigterm_is_met_like_ctrl_c(digits, tmp_path):
    with pytest.raises(Interrupted):
        train(*digits, directory=tmp_path, hook=(9, lambda: signal.raise_signal(signal.SIGTERM)))
    assert_same(train(*digits, directory=tmp_path, resume=True), train(*digits))
