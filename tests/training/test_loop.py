import csv
import itertools
import math

import pytest
import torch

from ncprior.training.checkpoints import load_checkpoint, save_checkpoint
from ncprior.training.loop import Diverged, cosine
from ncprior.vaes.likelihoods import BernoulliEmission

from . import jobs
from .jobs import fit, small_vae, train


def test_cosine():
    """Linear up to the peak, half a cosine down; mean 1/2 over a run without warm-up."""
    rates = [cosine(t, 100, 10) for t in range(100)]
    assert rates[:10] == pytest.approx([0.1 * t for t in range(1, 11)])
    assert rates[10] == 1 and rates[55] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[10:]))
    assert [cosine(0, 1), cosine(0, 100)] == [1, 1]
    assert cosine(0, 5, 10) == 0.1


class Failing(torch.nn.Module):
    """A likelihood that returns NaN from its n-th batch on."""

    def __init__(self, n):
        super().__init__()
        self.n = n

    def forward(self, logits):
        self.n -= 1
        return BernoulliEmission(logits * (math.nan if self.n < 0 else 1))


def failing_vae(n):
    vae = small_vae()
    vae.likelihood = Failing(n)
    return vae


@pytest.mark.parametrize(("n", "kept"), [(15, 10), (29, 20), (3, None)])
def test_nan_stops_and_keeps_the_last_good_checkpoint(n, kept, digits, tmp_path, monkeypatch):
    """The message names the step; what was saved before it can be resumed."""
    monkeypatch.setattr(jobs, "small_vae", lambda: failing_vae(n))
    options = {"directory": tmp_path, "evaluate_every": 100}
    said = "last good checkpoint is kept in .*vae-checkpoint.pt" if kept else "no checkpoint was"
    with pytest.raises(Diverged, match=f"the loss became NaN or infinite at step {n};.*{said}"):
        train(*digits, **options)
    if kept:
        assert load_checkpoint(tmp_path / "vae-checkpoint.pt")["step"] == kept
        monkeypatch.undo()
        weights, _ = train(*digits, **options, resume=True)
        assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.parametrize("run", [train, fit], ids=["vae", "ncp"])
def test_absurd_learning_rate(run, digits):
    with pytest.raises(Diverged, match=r"learning_rate \(now 1e\+38\) or clip_norm"):
        run(*digits, learning_rate=1e38)


@pytest.mark.parametrize("run", [train, fit], ids=["vae", "ncp"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_checkpoint_cut_short(run, share, digits, tmp_path):
    run(*digits, directory=tmp_path)
    (file,) = tmp_path.glob("*.pt")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=f"checkpoint .*{file.name} is damaged or cut short"):
        run(*digits, directory=tmp_path, resume=True)


def test_checkpoint_of_another_version(digits, tmp_path):
    torch.save({"format": 99}, tmp_path / "vae-checkpoint.pt")
    with pytest.raises(ValueError, match="of another version"):
        train(*digits, directory=tmp_path, resume=True)


class Evil:
    def __reduce__(self):
        return print, ("executed",)


def test_checkpoint_executes_nothing(digits, tmp_path, capsys):
    torch.save({"format": 1, "step": Evil()}, tmp_path / "vae-checkpoint.pt")
    with pytest.raises(ValueError, match="damaged"):
        train(*digits, directory=tmp_path, resume=True)
    assert "executed" not in capsys.readouterr().out


def test_checkpoint_of_other_settings(digits, tmp_path):
    fit(*digits, directory=tmp_path)
    with pytest.raises(ValueError, match=r"of (another run|a run with other settings)"):
        fit(*digits, directory=tmp_path, resume=True, network_options={"width": 9})


def test_checkpoint_round_trip(tmp_path):
    content = {"step": 3, "weights": {"a": torch.arange(3)}, "history": [{"loss": math.inf}]}
    save_checkpoint(tmp_path / "c.pt", content)
    found = load_checkpoint(tmp_path / "c.pt")
    assert found["history"] == content["history"] and found["step"] == 3
    assert torch.equal(found["weights"]["a"], torch.arange(3))


def test_logs(digits, tmp_path):
    """One row of the CSV per evaluation, the same as the history returned."""
    _, history = train(*digits, directory=tmp_path)
    rows = list(csv.DictReader((tmp_path / "logs" / "vae.csv").open()))
    assert [int(row["step"]) for row in rows] == [8, 16, 24, 32, 40]
    for row, expected in zip(rows, history, strict=True):
        assert {name: float(value) for name, value in row.items()} == pytest.approx(expected)


def test_without_a_directory_nothing_is_written(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(*digits)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("run", [train, fit], ids=["vae", "ncp"])
def test_global_generator_is_left_alone(run, digits):
    before = torch.get_rng_state()
    run(*digits)
    assert torch.equal(torch.get_rng_state(), before)


def test_seed_decides(digits):
    """The same seed gives the same weights, another one others."""
    a, b, other = (train(*digits, seed=seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], other[name]) for name in a)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"learning_rate": math.nan}, "learning_rate must be positive"),
        ({"evaluate_every": 0}, "evaluate_every must be positive"),
        ({"batch_size": 0}, "between 1 and the 1350 training images"),
        ({"batch_size": 1351}, "between 1 and the 1350 training images"),
        ({"kl_warmup": 1.5}, "kl_warmup is a share"),
    ],
)
def test_settings_that_cannot_work(options, message, digits):
    with pytest.raises(ValueError, match=message):
        train(*digits, **options)
