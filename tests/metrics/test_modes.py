import math

import pytest
import torch
from scipy.stats import binomtest

from ncprior.metrics import compare_modes
from ncprior.metrics.modes import class_counts, wilson


def drawn(shares, n, rng):
    return class_counts(
        torch.multinomial(torch.tensor(shares), n, True, generator=rng), len(shares)
    )


@pytest.mark.parametrize(("count", "total"), [(0, 20), (3, 50), (50, 50), (400, 1000)])
def test_wilson_against_scipy(count, total):
    expected = binomtest(count, total).proportion_ci(method="wilson")
    assert wilson(count, total) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_counts():
    assert class_counts(torch.tensor([2, 0, 2]), 4).tolist() == [1, 0, 2, 0]
    for bad, message in (
        (torch.tensor([4]), "between 0 and 3, got 4 to 4"),
        (torch.tensor([], dtype=torch.int64), "n at least 1"),
        (torch.tensor([0.5]), "must be int64"),
    ):
        with pytest.raises(ValueError, match=message):
            class_counts(bad, 4)


def test_by_hand(rng):
    found = compare_modes(torch.tensor([10, 30, 60]), torch.tensor([40, 60, 100]), generator=rng)
    # Shares 0.1, 0.3, 0.6 against 0.2, 0.3, 0.5.
    assert found.total_variation.value == pytest.approx(0.1)
    assert found.rarest == 0 and found.ratio == pytest.approx(0.5)
    low, high = found.ratio_interval
    assert 0 < low < 0.5 < high < 1.2


def test_equal_laws_raise_few_alarms(rng):
    """The interval of the rarest class holds for all classes at once: at most 5 % leave out 1.

    200 repeats count 10 with a deviation of 3.1; 22 is 4 of them more. Total variation is by
    chance what `by_chance` says.
    """
    shares = [0.02, 0.08, 0.1, 0.2, 0.3, 0.3]
    alarms, chance, values = 0, [], []
    for _ in range(200):
        found = compare_modes(drawn(shares, 2000, rng), drawn(shares, 1000, rng), generator=rng)
        alarms += found.ratio_interval[1] < 1
        chance.append(found.by_chance)
        values.append(found.total_variation.value)
    values = torch.tensor(values)
    assert alarms <= 22
    assert abs(values.mean() - sum(chance) / 200) < 4 * values.std() / math.sqrt(200)


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_a_dropped_class_is_named(kept, rng):
    shares = [0.1] * 10
    dropped = [0.1] * 7 + [0.1 * kept] + [0.1] * 2
    found = compare_modes(drawn(dropped, 3000, rng), drawn(shares, 3000, rng), generator=rng)
    assert found.rarest == 7
    low, high = found.ratio_interval
    truth = kept * 0.1 / (0.1 * kept + 0.9) / 0.1
    assert low <= truth < high < 0.6
    # The dropped tenth goes to the others: total variation is 0.1 - its share, plus chance.
    gap = found.total_variation.value - (0.1 - truth * 0.1)
    assert -4 * found.total_variation.se < gap < 4 * found.total_variation.se + found.by_chance


def test_a_class_that_the_data_lack_is_not_the_rarest(rng):
    found = compare_modes(torch.tensor([5, 0, 5]), torch.tensor([8, 0, 2]), generator=rng)
    assert found.rarest == 0


def test_rejects(rng):
    with pytest.raises(ValueError, match=r"got \(2,\) and \(3,\)"):
        compare_modes(torch.tensor([1, 2]), torch.tensor([1, 2, 3]), generator=rng)
    with pytest.raises(ValueError, match="must not be empty"):
        compare_modes(torch.tensor([0, 0]), torch.tensor([1, 2]), generator=rng)
    with pytest.raises(ValueError, match="count must be between 0 and total, got 3 of 2"):
        wilson(3, 2)
