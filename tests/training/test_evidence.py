import pytest
import torch
from torch import nn

import ncprior
from ncprior.training.evidence import EvidenceTable, encode


class Pixels(nn.Module):
    """An encoder that says what it saw."""

    def encode(self, images):
        return images.flatten(1), images.flatten(1) + 1


@pytest.fixture
def data(rng):
    """Grey images that are binarised anew on every pass."""
    return ncprior.ImageDataset(torch.rand(23, 1, 6, 6, generator=rng), binarize="dynamic")


ROWS = torch.arange(22, 2, -1)


def table(data, step=0, slices=6, seed=0):
    return EvidenceTable(Pixels(), data, ROWS, slices=slices, seed=seed, step=step)


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))


@pytest.mark.parametrize("slices", [1, 6, 20, 99])
def test_rebuilt_is_advanced(slices, data):
    """The table of a step, made at once or step by step from any earlier one, to the bit."""
    walked = table(data, slices=slices)
    for step in range(1, 50):
        walked.advance(step)
        assert_same(walked, table(data, step, slices))
        if step % 7 == 0:
            jumped = table(data, step // 2, slices)
            jumped.advance(step)
            assert_same(walked, jumped)


def test_rows_are_refreshed_in_turn(data):
    """A step draws one slice anew; after as many steps as slices every row is new."""
    found = table(data)
    start = found.tensors[0].clone()
    changed = torch.zeros(len(ROWS), dtype=torch.bool)
    for step in range(1, 7):
        before = found.tensors[0].clone()
        found.advance(step)
        now = (found.tensors[0] != before).any(1)
        assert 0 < now.sum() <= 4
        changed |= (found.tensors[0] != start).any(1)
    assert changed.all()  # 36 random bits come out the same once in a million rows


def test_rows_stay_in_their_places(data):
    """Row i of the table is image ROWS[i], refreshed or not: averages tend to its grey values."""
    found, total, steps = table(data), 0, 1200
    for step in range(1, steps + 1):
        found.advance(step)
        total = total + found[torch.arange(20)][0].double()
    grey = data.raw(ROWS).flatten(1).double()
    draws = steps / 6  # a row is drawn every 6 steps
    error = 5 * (grey * (1 - grey) / draws).sqrt() + 2 / draws  # 720 pixels: 1 seed in 2,000
    assert ((total / steps - grey).abs() < error).all()


def test_same_input_is_encoded_once(rng):
    data = ncprior.ImageDataset(torch.rand(23, 1, 3, 3, generator=rng))
    found = table(data)
    kept = found.tensors
    found.advance(1)
    found.advance(30)
    assert found.tensors is kept and found.step == 30
    torch.testing.assert_close(found.tensors[0], data.raw(ROWS).flatten(1))


def test_index_and_length(data):
    found = table(data)
    assert len(found) == 20
    loc, other = found[torch.tensor([3, 3, 0])]
    torch.testing.assert_close(loc, found.tensors[0][[3, 3, 0]])
    torch.testing.assert_close(other, loc + 1)


def test_seed(data):
    assert not torch.equal(table(data).tensors[0], table(data, seed=1).tensors[0])


def test_encode_by_batches(rng):
    data = ncprior.ImageDataset(torch.rand(23, 1, 3, 3, generator=rng))
    whole, parts = (encode(Pixels(), data, ROWS, batch_size=n) for n in (1000, 3))
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
