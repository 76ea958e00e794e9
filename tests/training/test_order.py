import pytest
import torch

from ncprior.training.order import RowOrder

ROWS = torch.arange(100, 113)


@pytest.mark.parametrize("batch_size", [1, 4, 13, 14, 40])
def test_each_pass_has_every_row_once(batch_size):
    order = RowOrder(ROWS, batch_size, seed=0)
    drawn = torch.cat([order(step) for step in range(26)])
    assert all(len(order(step)) == batch_size for step in range(3))
    for first in range(0, len(drawn) - 13, 13):
        assert torch.equal(drawn[first : first + 13].sort().values, ROWS)


def test_a_step_is_a_function_of_its_number():
    """Whatever was asked before: a resumed run reads the same rows."""
    order = RowOrder(ROWS, 5, seed=0)
    forwards = [order(step) for step in range(20)]
    for step in (19, 3, 11, 0, 7):
        assert torch.equal(RowOrder(ROWS, 5, seed=0)(step), forwards[step])
        assert torch.equal(order(step), forwards[step])


def test_passes_and_seeds_differ():
    order = RowOrder(ROWS, 13, seed=0)
    assert not torch.equal(order(0), order(1))
    assert not torch.equal(order(0), RowOrder(ROWS, 13, seed=1)(0))
