import math

import pytest
import torch

from ncprior.metrics.c2st import c2st


def normal(n, rng, size=3, shift=0.0):
    return shift + torch.randn(n, size, generator=rng, dtype=torch.float64)


def neighbours(seed):
    """Fast, and as unstable as a classifier can be."""
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(3)


class Centroids:
    """Says which of both means is nearer."""

    def __init__(self, seed):
        self.seed = seed

    def fit(self, features, labels):
        self.means = [features[labels == label].mean(0) for label in (0, 1)]

    def predict_proba(self, features):
        far = [((features - mean) ** 2).sum(1) for mean in self.means]
        of_x = torch.sigmoid(torch.tensor(far[0] - far[1]))
        return torch.stack([1 - of_x, of_x], 1).numpy()


class Coin:
    """Knows nothing, and says the same of every row."""

    def __init__(self, seed):
        self.seed = seed

    def fit(self, features, labels):
        assert len(features) == len(labels) and labels.mean() == 0.5

    def predict_proba(self, features):
        return torch.full((len(features), 2), 0.5).numpy()


def test_separate_sets(rng):
    found = c2st(normal(60, rng), normal(60, rng, shift=9.0), folds=3, generator=rng)
    assert found.accuracy > 0.98 and found.p_value == 0.5**40 and found.comparisons == 40


def test_accuracy_of_the_best_classifier(rng):
    """N(0, I) and N(0.5, I) in 4 dimensions are told apart with accuracy Phi(0.5), not more.

    4 standard errors; a classifier of 800 rows each misses at most a fifth of what is to be seen.
    """
    found = c2st(normal(1000, rng, 4), normal(1000, rng, 4, shift=0.5), generator=rng)
    best = 0.5 * (1 + math.erf(0.5 / math.sqrt(2)))
    assert 0.5 + 0.8 * (best - 0.5) - 4 * found.se < found.accuracy < best + 4 * found.se
    assert found.p_value < 1e-10
    assert found.se == pytest.approx(math.sqrt(best * (1 - best) / 2000), rel=0.15)


def test_sees_a_spread_and_a_mixture(rng):
    """Where both means are the same: one by the squares, the other by trees and neighbours."""
    x, y = normal(400, rng, 10), 1.3 * normal(400, rng, 10)
    assert c2st(x, y, folds=3, generator=rng).p_value < 1e-3
    side = torch.randint(2, (400, 1), generator=rng) * 2.0 - 1
    y = torch.cat([0.3 * x[:, :2] + 0.95 * side, x[:, 2:]], 1)[torch.randperm(400, generator=rng)]
    assert c2st(normal(400, rng, 10), y, folds=3, generator=rng).p_value < 1e-3


def test_judges_only_what_it_was_not_fitted_on(rng):
    """Nearest neighbours are always right about rows that they were fitted on."""
    one = lambda seed: neighbours(seed).set_params(n_neighbors=1)
    found = c2st(normal(300, rng), normal(300, rng), classifier=one, generator=rng)
    assert abs(found.accuracy - 0.5) < 5 * found.se and found.p_value > 1e-3


def test_learns_from_extra_rows(rng):
    """Points around 40 centres and points anywhere: 60 rows of each are not enough to tell."""
    centres = normal(40, rng, 5)

    def around(n):
        return centres[torch.randint(40, (n,), generator=rng)] + 0.2 * normal(n, rng, 5)

    x, y = around(60), 1.02 * normal(60, rng, 5)
    alone = c2st(x, y, folds=2, generator=rng)
    found = c2st(x, y, folds=2, extra=(around(800), normal(800, rng, 5)), generator=rng)
    assert found.accuracy > alone.accuracy + 3 * found.se and found.p_value < 1e-6
    assert (alone.comparisons, found.comparisons) == (30, 60)


def test_extra_rows_of_another_law_prove_nothing(rng):
    """A classifier that has learnt to tell them says the same of equal laws: 4 standard errors."""
    extra = (normal(200, rng, shift=1.0), normal(200, rng))
    options = {"folds": 2, "extra": extra, "classifier": Centroids}
    share, level = false_positives(rng, 200, **options), expected_below(0.1, 30)
    assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 200)


def test_ties_are_decided_by_a_coin(rng):
    found = c2st(normal(500, rng), normal(500, rng, shift=5.0), classifier=Coin, generator=rng)
    assert found.accuracy == 0.5 and found.se == 0
    assert found.p_value > 1e-4 and found.comparisons == 400


def false_positives(rng, runs, **options):
    """The share of p-values of at most 0.1 between sets of 30 rows."""
    found = [c2st(normal(30, rng), normal(30, rng), **options, generator=rng) for _ in range(runs)]
    return sum(f.p_value <= 0.1 for f in found) / runs


def expected_below(level, throws):
    """The chance that the p-value of a fair coin is at most `level`: less, for it has steps."""
    tails = [
        sum(math.comb(throws, i) for i in range(k, throws + 1)) / 2**throws
        for k in range(throws + 2)
    ]
    return max(t for t in tails if t <= level)


def test_false_positives(rng):
    """Over 200 repeats, 4 standard errors around what a fair coin gives: 15 comparisons each."""
    share = false_positives(rng, 200, folds=2, classifier=neighbours)
    level = expected_below(0.1, 15)
    assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 200)


@pytest.mark.slow
def test_false_positives_of_the_default_classifier(rng):
    share = false_positives(rng, 200, folds=2)
    level = expected_below(0.1, 15)
    assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 200)


def test_rejects_extra_rows_of_another_shape(rng):
    extra = (torch.zeros(9, 2), torch.zeros(8, 2))
    with pytest.raises(ValueError, match="extra must be two sets"):
        c2st(torch.rand(30, 2), torch.rand(30, 2), folds=2, extra=extra, generator=rng)


def test_the_same_seed_says_the_same(rng):
    x, y = normal(40, rng), normal(40, rng)
    first, again = (
        c2st(x, y, folds=2, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert first == again


@pytest.mark.parametrize(
    ("x", "y", "folds", "message"),
    [
        (torch.zeros(50, 2), torch.zeros(40, 2), 5, r"\(50, 2\) and \(40, 2\)"),
        (torch.zeros(49, 2), torch.zeros(49, 2), 5, "10 rows for each"),
        (torch.zeros(50, 2), torch.zeros(50, 2), 1, "2 or more folds"),
        (torch.full((50, 1), math.nan), torch.zeros(50, 1), 5, "finite"),
    ],
)
def test_rejects_what_cannot_be_compared(rng, x, y, folds, message):
    with pytest.raises(ValueError, match=message):
        c2st(x, y, folds=folds, generator=rng)
