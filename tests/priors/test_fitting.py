import math

import pytest
import torch
from torch import nn

from ncprior.priors.fitting import descend, first_weights


class Point(nn.Module):
    """One number, with the loss (x - target)^2."""

    def __init__(self, start=0.0):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=torch.float64))
        self.still = nn.Parameter(torch.tensor(7.0), requires_grad=False)


def fit(point, *, target=3.0, held=None, noise=0.0, **settings):
    def loss(generator):
        shift = noise * torch.randn((), generator=generator, dtype=torch.float64)
        return (point.x - target + shift).square()

    held = held or (lambda: float((point.x - target).square()))
    options = {"steps": 500, "learning_rate": 0.1, "evaluate_every": 50, "seed": 0}
    return descend(point, loss, held, **(options | settings))


def test_finds_the_minimum():
    point = Point()
    history = fit(point)
    assert point.x.item() == pytest.approx(3, abs=1e-3) and point.still.item() == 7
    assert not point.training
    assert [entry["step"] for entry in history] == list(range(50, 501, 50))


def test_rate_falls_along_half_a_cosine():
    """With a constant gradient each step of Adam is the rate: they sum to half of steps * rate."""
    point = Point()
    descend(point, lambda _: -point.x, lambda: -point.x.item(), steps=400, learning_rate=0.01,
            seed=0)  # fmt: skip
    # The sum over i < n of (1 + cos(pi i / n)) / 2 is (n + 1) / 2; Adam's epsilon takes 1e-8.
    assert point.x.item() == pytest.approx(0.01 * 401 / 2, rel=1e-6)


def test_keeps_the_best_weights():
    """The held-out loss is least at 1, the loss at 3: what was nearest to 1 is kept."""
    point, seen = Point(), []

    def held():
        seen.append(point.x.item())
        return (seen[-1] - 1) ** 2

    fit(point, held=held, learning_rate=0.02, evaluate_every=10)
    assert point.x.item() == min(seen, key=lambda x: (x - 1) ** 2)
    assert point.x.item() == pytest.approx(1, abs=0.2)


def test_patience_ends_it():
    point, losses = Point(), iter([1.0, 2.0, 2.0, 2.0, 0.0])
    history = fit(point, held=lambda: next(losses), patience=3)
    assert [entry["step"] for entry in history] == [50, 100, 150, 200]


def test_average_follows_the_formula():
    """The kept weights are the moving average of those that plain descent goes through."""
    path, point = [], Point()

    def note():
        path.append(float(point.x))
        return -float(len(path))  # each is better than the one before

    fit(point, held=note, steps=30, evaluate_every=1)
    average = 0.0
    for step, x in enumerate(path, 1):
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * x
    other = Point()
    fit(other, held=lambda: float((other.x - 3).square()), steps=30, evaluate_every=1, average=0.9)
    assert other.x.item() == pytest.approx(average, rel=1e-12)


def test_seed_decides_the_noise():
    found = []
    for seed in (0, 0, 1):
        point = Point()
        fit(point, noise=1.0, seed=seed, steps=20)
        found.append(float(point.x))
    assert found[0] == found[1] != found[2]


def test_clip_norm_bounds_the_gradient():
    """AdamW does not feel the size of all gradients, but that of one among small ones."""
    ends = []
    for clip in (None, 1.0):
        point = Point()
        scales = iter([1e6] + [1.0] * 99)

        def loss(_, point=point, scales=scales):
            return next(scales) * (point.x - 3)

        descend(point, loss, lambda point=point: point.x.item() - 3, steps=100,
                learning_rate=0.01, clip_norm=clip, seed=0)  # fmt: skip
        ends.append(float(point.x))
    # After a gradient a million times the others Adam all but stands still.
    assert ends[1] < -0.4 and ends[0] > -0.2


@pytest.mark.parametrize(
    ("part", "value"), [("loss", math.nan), ("heldout_loss", math.nan), ("heldout_loss", math.inf)]
)
def test_stops_where_numbers_end(part, value):
    point = Point()
    broken = {"held": lambda: value} if part == "heldout_loss" else {"target": value}
    with pytest.raises(FloatingPointError, match=f"{part} is {value} at step 50"):
        fit(point, **broken)


@pytest.mark.parametrize("setting", ["steps", "evaluate_every"])
def test_settings_out_of_range(setting):
    with pytest.raises(ValueError, match=f"{setting} must be at least 1, got 0"):
        fit(Point(), **{setting: 0})


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="parameters that require a gradient"):
        descend(nn.Identity(), lambda _: torch.zeros(()), lambda: 0.0, steps=1, learning_rate=0.1,
                seed=0)  # fmt: skip


def test_first_weights_leave_the_global_state():
    before = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        with first_weights(seed):
            found.append(nn.Linear(2, 2).weight)
        torch.rand(3)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    torch.set_rng_state(before)
    with first_weights(0):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)
