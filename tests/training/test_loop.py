import csv
import itertools
import math
import os
import signal
from copy import deepcopy

import pytest
import torch
from toys import interrupt_at

import ncprior
from ncprior.training import keeping, loop
from ncprior.training.checkpoints import load_checkpoint, save_checkpoint
from ncprior.training.loop import Diverged, Interrupted, cosine
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


def test_cosine_ends_where_it_is_told():
    rates = [cosine(t, 100, 10, 0.2) for t in range(101)]
    assert rates[9] == rates[10] == 1 and rates[0] == 0.1
    assert rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)


class Failing(torch.nn.Module):
    """A likelihood that returns NaN at its n-th batch (from 0) and `times` - 1 more.

    With a set n, at those batches.
    """

    def __init__(self, n, times=math.inf):
        super().__init__()
        self.n, self.times, self.seen = n, times, 0

    def forward(self, logits):
        self.seen += 1
        if isinstance(self.n, set):
            bad = self.seen - 1 in self.n
        else:
            bad = self.n < self.seen <= self.n + self.times
        return BernoulliEmission(logits * (math.nan if bad else 1))


def failing_vae(n, times=math.inf, make=small_vae):
    vae = make()
    vae.likelihood = Failing(n, times)
    return vae


@pytest.mark.parametrize(("n", "kept"), [(15, 10), (29, 20), (3, None)])
def test_nan_stops_and_keeps_the_last_good_checkpoint(n, kept, digits, tmp_path, monkeypatch):
    """The message names the step; what was saved before it can be resumed."""
    monkeypatch.setattr(jobs, "small_vae", lambda: failing_vae(n))
    options = {"directory": tmp_path, "evaluate_every": 100, "retries": 0}
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
    with pytest.raises(
        Diverged, match=r"learning_rate \(now 1e\+38, halved 3 times\) or clip_norm"
    ):
        run(*digits, learning_rate=1e38)


def small_conv_vae():
    """With batch norms, whose running means a step that fails has moved already."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ncprior.build_vae(
            (1, 8, 8), network="conv", channels=(4, 4), latent_size=3, kernel=3
        )


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def training(digits, monkeypatch):
    """Train a VAE that fails at the n-th batch; evaluations come only at the end."""

    def run(n, times=1, make=small_conv_vae, **options):
        monkeypatch.setattr(jobs, "small_vae", lambda: failing_vae(n, times, make))
        return train(*digits, **{"evaluate_every": 100} | options)

    return run


NEVER = math.inf


def test_nan_before_any_checkpoint_starts_anew_at_half_the_rate(training, capsys):
    """Exactly the run at half the rate: nothing is left of the three steps before."""
    weights, history = training(3)
    expected, (last,) = training(NEVER, learning_rate=0.5e-3)
    assert_equal(weights, expected)
    assert history == [last | {"recoveries": 1.0}]
    (line,) = capsys.readouterr().err.splitlines()
    assert "NaN or infinite at step 3: back to step 0, with half the learning rate" in line
    assert "recovery 1 of at most 3" in line


def halve(checkpoint):
    content = load_checkpoint(checkpoint)
    save_checkpoint(checkpoint, content | {"halvings": content["halvings"] + 1})


@pytest.fixture
def half_from_twenty(training, tmp_path):
    """Stopped at its checkpoint of step 20 and told there to go on at half the rate."""
    with pytest.raises(Interrupted):
        training(NEVER, make=lambda: interrupt_at(small_conv_vae(), 20, ctrl_c), directory=tmp_path)
    halve(tmp_path / "vae-checkpoint.pt")
    return training(NEVER, directory=tmp_path, resume=True)


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("on_disk", [True, False])
def test_nan_goes_back_to_the_last_checkpoint(on_disk, training, half_from_twenty, tmp_path):
    """On disk, or in memory where there is no directory."""
    place = {"directory": tmp_path / "new"} if on_disk else {}
    weights, history = training(27, **place)
    assert_equal(weights, half_from_twenty[0])
    assert history == half_from_twenty[1]
    if on_disk:
        (row,) = csv.DictReader((tmp_path / "new" / "logs" / "vae.csv").open())
        assert row["recoveries"] == "1.0"


def test_back_to_the_same_state_twice(training, tmp_path):
    """What is kept in memory is not what the run goes on with and changes."""
    found, expected = training({27, 31}), training({27, 31}, directory=tmp_path)
    assert_equal(found[0], expected[0])
    assert found[1] == expected[1] and found[1][0]["recoveries"] == 2
    _, history = training({12, 24}, checkpoint_every=100, evaluate_every=8)  # to the start
    assert [row["step"] for row in history] == [8, 16, 24, 32, 40]


@pytest.mark.parametrize("walks", [3, 9])
def test_resumed_after_a_recovery(walks, training, half_from_twenty, tmp_path):
    """The halved rate outlives the process, before the next checkpoint and after it."""
    make = lambda: interrupt_at(small_conv_vae(), 28 + walks, ctrl_c)
    with pytest.raises(Interrupted):
        training(27, make=make, directory=tmp_path / "new")
    assert load_checkpoint(tmp_path / "new" / "vae-checkpoint.pt")["halvings"] == 1
    found = training(NEVER, directory=tmp_path / "new", resume=True)
    assert_equal(found[0], half_from_twenty[0])
    assert found[1] == half_from_twenty[1]


def test_killed_after_a_recovery(training, half_from_twenty, tmp_path, monkeypatch):
    """The checkpoint knows of the recovery at once."""

    def die():
        raise KeyboardInterrupt

    make = lambda: interrupt_at(small_conv_vae(), 31, die)
    with pytest.raises(KeyboardInterrupt):
        training(27, make=make, directory=tmp_path / "new")
    found = training(NEVER, directory=tmp_path / "new", resume=True)
    assert_equal(found[0], half_from_twenty[0])


def test_recoveries_are_counted_over_the_run(training, tmp_path):
    """Three by default; then it stops, and another learning rate starts afresh."""
    with pytest.raises(Diverged, match=r"at step 20; the last good.*1e-06, halved 3 times"):
        training(27, times=4, directory=tmp_path, learning_rate=1e-6)
    content = load_checkpoint(tmp_path / "vae-checkpoint.pt")
    assert content["step"] == 20 and content["halvings"] == 3
    with pytest.raises(Diverged):
        training(1, directory=tmp_path, resume=True, learning_rate=1e-6)
    _, (row,) = training(1, directory=tmp_path, resume=True, learning_rate=1e-7)
    assert row["recoveries"] == 1


@pytest.mark.parametrize("n", [12, 19, 27, 38, 39])
def test_nan_found_later(n, training, monkeypatch, tmp_path):
    """Where nobody looks at each step, as on a GPU: the same run, and nothing broken is saved."""
    expected, history = training(n)
    saved = []
    monkeypatch.setattr(loop._Steps, "looks", lambda self, step: step % 10 == 5)
    monkeypatch.setattr(
        keeping, "save_checkpoint", lambda path, content: saved.append(deepcopy(content))
    )
    monkeypatch.setattr(keeping, "load_checkpoint", lambda path: deepcopy(saved[-1]))
    weights, found = training(n, directory=tmp_path)
    assert_equal(weights, expected)
    assert found == history and history[0]["recoveries"] == 1
    for content in saved:
        assert all(t.isfinite().all() for t in content["weights"].values())


def test_weights_that_overflow_are_never_saved(digits, tmp_path):
    """At an absurd rate with a checkpoint after each step: only finite ones are written."""
    with pytest.raises(Diverged):
        train(*digits, directory=tmp_path, learning_rate=1e38, checkpoint_every=1)
    file = tmp_path / "vae-checkpoint.pt"
    if file.exists():
        assert all(t.isfinite().all() for t in load_checkpoint(file)["weights"].values())


class Overflowing:
    """A job of one weight, whose loss at step 2 is finite but not once it is scaled."""

    def __init__(self):
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.module.weight)
        self.seen = []

    def loss(self, model, step, generator):
        self.seen.append(self.module.weight.item())
        loss = model(torch.ones(1, 1)).float().sum() * (1e37 if step == 2 else 1)
        return loss, {"loss": loss}

    def evaluate(self, step):
        return {}

    def should_stop(self):
        return False

    def identity(self):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize("optimizer", ["adamw", "adamax"])
def test_half_precision_skips_a_step_that_overflows(optimizer, clip_norm, tmp_path):
    """The weight stays, the scale 2^10 is halved and saved, and there is no recovery."""
    job, fabric = Overflowing(), loop.make_fabric("cpu", "16-mixed")
    assert fabric.strategy.precision.scaler.get_scale() == 2**10
    options = {"steps": 6, "learning_rate": 0.01, "evaluate_every": 6, "checkpoint_every": 5}
    (row,) = loop.optimise(
        job,
        fabric,
        place=loop.Place(tmp_path, tensorboard=False),
        optimizer=optimizer,
        clip_norm=clip_norm,
        progress=False,
        **options,
    )
    moved = [a != b for a, b in itertools.pairwise(job.seen)]
    assert moved == [True, True, False, True, True]
    assert "recoveries" not in row
    content = load_checkpoint(tmp_path / "train-checkpoint.pt")
    assert content["precision"]["scale"] == 2**9


def test_global_draws_are_not_those_of_the_generator():
    """Dropout masks made of the numbers that made the draws would give the draws away."""

    class Drawing(Overflowing):
        def __init__(self):
            super().__init__()
            self.drawn = []

        def loss(self, model, step, generator):
            self.drawn += [torch.rand(4, generator=generator), torch.rand(4)]
            return model(torch.ones(1, 1)).sum(), {}

    job, again = Drawing(), Drawing()
    for one in (job, again):
        options = {"steps": 3, "learning_rate": 0.01, "progress": False}
        loop.optimise(one, loop.make_fabric("cpu"), place=loop.Place(), **options)
    assert len({tuple(x.tolist()) for x in job.drawn}) == 6
    assert all(map(torch.equal, job.drawn, again.drawn))


def test_loss_alone_is_not_finite(monkeypatch, tmp_path):
    """Not even weights that are still finite are saved, whenever somebody looks."""

    class Lost(Overflowing):
        def loss(self, model, step, generator):
            loss = model(torch.ones(1, 1)).sum() + (math.nan if step == 3 else 0)
            return loss, {}

    monkeypatch.setattr(loop._Steps, "looks", lambda self, step: False)
    with pytest.raises(Diverged):
        loop.optimise(
            Lost(),
            loop.make_fabric("cpu"),
            place=loop.Place(tmp_path, tensorboard=False),
            steps=6,
            learning_rate=0.01,
            checkpoint_every=2,
            progress=False,
        )
    assert load_checkpoint(tmp_path / "train-checkpoint.pt")["step"] == 2


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_gradients_that_are_not_finite_are_met(clip_norm):
    """In single precision an infinite gradient breaks the weight, which the next step sees."""

    class Root(Overflowing):
        def loss(self, model, step, generator):
            at = model(torch.ones(1, 1)).sum()
            loss = (at - at.detach()).abs().sqrt() if step == 2 else at
            return loss, {"loss": loss}

    with pytest.raises(Diverged, match="at step 3"):
        loop.optimise(
            Root(),
            loop.make_fabric("cpu"),
            place=loop.Place(),
            steps=6,
            learning_rate=0.01,
            clip_norm=clip_norm,
            retries=0,
            progress=False,
        )


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
        ({"learning_rate_end": 1.0}, "learning_rate_end must be between 0 and learning_rate"),
        ({"optimizer": "sgd"}, 'optimizer must be "adamw", "adam" or "adamax", got \'sgd\''),
        ({"eps": 0.0}, "eps must be positive"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"devices": 0}, "devices must be at least 1"),
        ({"kl_start": -0.1}, "kl_start is a share"),
        ({"norm_penalty": -1.0}, "norm_penalty must be at least 0"),
        ({"norm_penalty_initial": 1.0}, "must both be positive, got 1.0 and 0"),
        ({"evaluate_every": 0}, "evaluate_every must be positive"),
        ({"batch_size": 0}, "between 1 and the 1350 training images"),
        ({"batch_size": 1351}, "between 1 and the 1350 training images"),
        ({"kl_warmup": 1.5}, "kl_warmup is a share"),
    ],
)
def test_settings_that_cannot_work(options, message, digits):
    with pytest.raises(ValueError, match=message):
        train(*digits, **options)
