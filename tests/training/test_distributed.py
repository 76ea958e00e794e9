"""Two processes on one machine against one."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ncprior.training.synced import SyncedBatchNorm2d, synchronised_batch_norms

from . import together

HERE = Path(__file__).resolve()


def environment():
    paths = [str(HERE.parents[1]), str(HERE.parents[2] / "src")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def two_processes(*arguments):
    """What torchrun would start, but for torchrun itself, which takes long to import."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment() | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment(), capture_output=True, text=True
    )


@pytest.mark.slow
def test_two_processes_take_the_same_steps_as_one(tmp_path):
    """Weights, running statistics and figures, in float64; one process alone writes.

    The same where the loss of the second process is NaN once: both go back.
    """
    two_processes(HERE.parent / "together.py", tmp_path)
    runs = {"plain": together.train(), "recovered": together.train(nan_at=6)}
    assert runs["recovered"][1][-1]["recoveries"] == 1
    for rank in (0, 1):
        found = torch.load(tmp_path / f"process-{rank}.pt", weights_only=True)
        for run, (expected, history) in runs.items():
            weights, figures = found[run]
            for name, tensor in expected.items():
                torch.testing.assert_close(weights[name], tensor, rtol=1e-9, atol=1e-9)
            for row, other in zip(figures, history, strict=True):
                assert row == pytest.approx(other, rel=1e-6)
    assert (tmp_path / "logs" / "vae.csv").read_text().count("\n") == 3


@pytest.mark.slow
def test_a_run_by_two_processes(tmp_path):
    """The command under torchrun: one directory, whole; a second time it is refused."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[data]\nsource = "digits"\n[vae]\npreset = "digits"\n'
        '[train]\nsteps = 4\nbatch_size = 16\nevaluate_every = 2\ndevice = "cpu"\n'
    )
    command = ("-m", "ncprior", "train", recipe, "--out", tmp_path / "run")
    done = torchrun(*command)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"config.toml", "splits.npz", "vae", "logs"}
    again = torchrun(*command)
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1


def test_batches_must_divide(monkeypatch):
    fabric = SimpleNamespace(world_size=2, device=torch.device("cpu"))
    monkeypatch.setattr("ncprior.training.vae.make_fabric", lambda *_: fabric)
    with pytest.raises(ValueError, match="divisible by the 2 processes, got 9"):
        together.train(batch_size=9)


@pytest.mark.parametrize("momentum", [0.05, None])
@pytest.mark.parametrize("affine", [True, False])
def test_synced_batch_norm_alone_is_batch_norm(momentum, affine, rng, monkeypatch):
    """Outputs, gradients and running statistics; far from 0, where digits are easily lost."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    ours, torchs = (
        kind(3, momentum=momentum, affine=affine) for kind in (SyncedBatchNorm2d, nn.BatchNorm2d)
    )
    for _ in range(3):
        x = torch.randn(5, 3, 4, 4, generator=rng) + 100
        gradients = []
        for norm in (ours, torchs):
            leaf = x.clone().requires_grad_()
            y = norm(leaf)
            y.sin().sum().backward()
            gradients.append((y.detach(), leaf.grad, *(p.grad for p in norm.parameters())))
        for found, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for name, tensor in torchs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))
    before = ours.running_mean.clone()  # as where activations are computed again
    ours.momentum, ours.num_batches_tracked = 0.0, None
    ours.train()(x + 1)
    assert torch.equal(ours.running_mean, before)


def test_batch_norms_are_replaced_for_a_while():
    """With the same tensors under the same names."""
    vae = together.ConvVAE()
    plain, names = list(vae.modules()), list(vae.state_dict())
    with synchronised_batch_norms(vae):
        within = [part for part in vae.modules() if isinstance(part, nn.BatchNorm2d)]
        assert [type(part) for part in within] == [SyncedBatchNorm2d] * 3
        assert list(vae.state_dict()) == names
        before = [part for part in plain if isinstance(part, nn.BatchNorm2d)]
        assert within[0].weight is before[0].weight
        vae.eval()
        vae.float()
    assert list(vae.modules()) == plain
    assert not any(part.training for part in plain)
    assert all(tensor.dtype != torch.float64 for tensor in vae.state_dict().values())
