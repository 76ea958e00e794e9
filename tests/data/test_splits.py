import pytest
import torch

from ncprior.data import Splits, check_splits, fixed_splits, random_splits


def test_random_splits_cover_all_rows_once():
    splits = random_splits(100, 0.1, 25, seed=0)
    assert [len(part) for part in splits] == [65, 10, 25]
    assert torch.equal(torch.cat(splits).sort().values, torch.arange(100))
    assert all(part.dtype == torch.int64 for part in splits)
    check_splits(splits, 100)


def test_seed_decides():
    first, same, other = (random_splits(50, 5, 5, seed=seed).test for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_small_fractions_still_give_images():
    assert [len(part) for part in random_splits(5, 0.1, 0.1, seed=0)] == [2, 1, 2]


def test_fixed_splits_are_in_order():
    splits = fixed_splits(4, 2, 3)
    assert [part.tolist() for part in splits] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]


@pytest.mark.parametrize("n", [0, 1, 4])
def test_too_few_images(n):
    with pytest.raises(ValueError, match=f"at least 5 images.*got {n}"):
        random_splits(n, 0.1, 0.1, seed=0)


@pytest.mark.parametrize(
    ("validation", "test", "message"),
    [
        (0, 2, "validation must have at least 1 images, got 0"),
        (-1, 2, "validation must have at least 1"),
        (1, 1, "test must have at least 2 images, got 1"),
        (5, 5, "leave 0 of 10 images for train"),
        (9, 9, "leave -8 of 10"),
        (1.0, 2, "strictly between 0 and 1, got 1.0"),
        (0.1, 0.0, "test as a fraction"),
        (float("nan"), 2, "strictly between"),
    ],
)
def test_amounts_out_of_range(validation, test, message):
    with pytest.raises(ValueError, match=message):
        random_splits(10, validation, test, seed=0)


@pytest.mark.parametrize("bad", [True, "3", None])
def test_amounts_of_the_wrong_type(bad):
    with pytest.raises(TypeError, match="validation must be a number of images"):
        random_splits(10, bad, 2, seed=0)


@pytest.mark.parametrize("counts", [(1, 1, 2), (2, 0, 2), (2, 1, 1)])
def test_fixed_splits_need_images(counts):
    with pytest.raises(ValueError, match="must have at least"):
        fixed_splits(*counts)


def test_fixed_splits_take_counts_only():
    with pytest.raises(TypeError, match="test must be a number of images"):
        fixed_splits(2, 1, 0.5)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ([0, 1], [1, 4], "disjoint, but row 1 comes 2 times"),
        ([0, 0], [3, 4], "row 0 comes 2 times"),
        ([0, 1], [3, 5], "splits.test has rows 3 to 5; the data set has 0 to 4"),
        ([-1, 1], [3, 4], "splits.train has rows -1"),
        ([0], [3, 4], "splits.train must have at least 2 images, got 1"),
    ],
)
def test_splits_by_hand_are_checked(train, test, message):
    splits = Splits(torch.tensor(train), torch.tensor([2]), torch.tensor(test))
    with pytest.raises(ValueError, match=message):
        check_splits(splits, 5)


def test_splits_by_hand_must_be_rows():
    with pytest.raises(TypeError, match=r"splits\.validation must be an int64 tensor"):
        check_splits(Splits(torch.tensor([0, 1]), torch.tensor([0.5]), torch.tensor([3, 4])), 5)
