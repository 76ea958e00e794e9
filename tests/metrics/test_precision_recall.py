import math

import pytest
import torch

from ncprior.metrics import prdc
from ncprior.metrics.precision_recall import PrecisionRecall


def features(n, rng, size=2, scale=1.0, shift=0.0):
    return shift + scale * torch.randn(n, size, generator=rng, dtype=torch.float64)


def direct(real, samples, k):
    """The definitions, point by point."""

    def radius(points, i):
        return sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1]

    real, samples = real.tolist(), samples.tolist()
    balls = [(p, radius(real, i)) for i, p in enumerate(real)]
    theirs = [(p, radius(samples, i)) for i, p in enumerate(samples)]
    inside = [[math.dist(p, y) <= r for p, r in balls] for y in samples]
    return (
        sum(any(row) for row in inside) / len(samples),
        sum(any(math.dist(p, x) <= r for p, r in theirs) for x in real) / len(real),
        sum(map(sum, inside)) / (k * len(samples)),
        sum(any(column) for column in zip(*inside, strict=True)) / len(real),
    )


def without(points, block, blocks):
    return points[torch.arange(len(points)) % blocks != block]


def test_against_the_definitions_and_a_jackknife_done_by_hand(rng):
    """Unequal sets, near each other; every leave-one-out value computed from scratch."""
    real, samples, k, blocks = features(31, rng), features(23, rng, 2, 0.7, 0.5), 3, 4
    found = prdc(real, samples, k=k, blocks=blocks)
    variance = torch.zeros(4, dtype=torch.float64)
    for of_real in (True, False):
        left_out = [
            direct(
                without(real, b, blocks) if of_real else real,
                samples if of_real else without(samples, b, blocks),
                k,
            )
            for b in range(blocks)
        ]
        variance += (blocks - 1) * torch.tensor(left_out, dtype=torch.float64).var(0, correction=0)
    assert [f.value for f in found] == pytest.approx(direct(real, samples, k), rel=1e-12)
    assert [f.se for f in found] == pytest.approx(variance.sqrt().tolist(), rel=1e-9)
    assert PrecisionRecall._fields == ("precision", "recall", "density", "coverage")


def test_chunks_do_not_change_it(rng, monkeypatch):
    real, samples = features(40, rng), features(50, rng)
    expected = prdc(real, samples)
    monkeypatch.setattr("ncprior.metrics.precision_recall.NUMBERS_AT_ONCE", 130)
    assert prdc(real, samples) == expected


def test_sets_far_apart(rng):
    found = prdc(features(30, rng), features(30, rng, shift=50.0))
    assert [f.value for f in found] == [0, 0, 0, 0] and [f.se for f in found] == [0, 0, 0, 0]


def test_equal_laws(rng):
    """Density 1 on average and coverage 1 - prod (n - i) / (n + m - i), in any space.

    The i-th neighbours of a point among n - 1 + m others are all real with that probability.
    """
    n, m, k, runs = 60, 90, 3, 100
    found = [prdc(features(n, rng, 5), features(m, rng, 5), k=k) for _ in range(runs)]
    expected = 1 - math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    for name, truth in (("density", 1.0), ("coverage", expected)):
        values = torch.tensor([getattr(f, name).value for f in found], dtype=torch.float64)
        said = torch.tensor([getattr(f, name).se for f in found], dtype=torch.float64)
        assert abs(values.mean() - truth) < 4 * values.std() / math.sqrt(runs)
        # On the safe side, as the docstring says; 100 runs know the spread to 7 %.
        assert 1 - 4 * 0.07 < said.square().mean().sqrt() / values.std() < 2.1 + 4 * 0.15


def test_dropping_half_of_the_law_shows_in_recall_and_coverage(rng):
    real = features(400, rng)
    whole, half = prdc(real, features(400, rng)), features(800, rng)
    half = prdc(real, half[half[:, 0] > 0][:400])
    for name in ("recall", "coverage"):
        gap = getattr(whole, name).value - getattr(half, name).value
        assert gap > 0.3 and gap > 4 * getattr(half, name).se
    assert half.precision.value > 0.9


@pytest.mark.parametrize(
    ("real", "samples", "options", "message"),
    [
        (torch.rand(20, 2), torch.rand(20, 3), {}, "as many features"),
        (torch.rand(20, 2), torch.full((20, 2), math.nan), {}, "samples must be finite"),
        (torch.zeros(20, 2), torch.rand(20, 2), {}, "real must differ from image to image"),
        (
            torch.rand(20, 2),
            torch.cat([torch.zeros(15, 2), torch.rand(5, 2)]),
            {},
            "samples must differ from row to row: 5 neighbours",
        ),
        (torch.rand(20, 2), torch.rand(20, 2), {"k": 0}, "k must be at least 1"),
        (torch.rand(6, 2), torch.rand(20, 2), {}, "more than k points remain"),
        (torch.rand(20, 2), torch.rand(20, 2), {"blocks": 1}, "blocks between 2 and 20"),
    ],
)
def test_rejects(real, samples, options, message):
    with pytest.raises(ValueError, match=message):
        prdc(real, samples, **options)


@pytest.mark.parametrize("seed", range(50))
def test_equal_rows_are_found_in_spite_of_rounding(seed):
    """Their distances come from products and are not always 0."""
    rng = torch.Generator().manual_seed(seed)
    samples = torch.cat([torch.zeros(15, 2), torch.rand(5, 2, generator=rng)])
    with pytest.raises(ValueError, match="samples must differ from row to row"):
        prdc(torch.rand(20, 2, generator=rng), samples)
