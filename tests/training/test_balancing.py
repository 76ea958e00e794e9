import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ncprior.training.balancing import balance, scale_weights

DATA = Path(__file__).resolve().parents[1] / "vaes" / "nvae" / "data"


@pytest.fixture(params=["mnist-tiny", "cifar-tiny"])
def recorded(request):
    """Arrays of the published program, and the shapes of the latents behind them."""
    told = json.loads((DATA / f"{request.param}.json").read_text())
    with np.load(DATA / f"{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    names = [f"group{k:02d}_z" for k in range(told["num_groups"])]
    return arrays, [tuple(arrays[name].shape[1:]) for name in names]


@pytest.mark.parametrize("rule", ["equal", "linear", "sqrt", "square"])
def test_published_scale_weights(recorded, rule):
    arrays, shapes = recorded
    assert scale_weights(shapes, rule) == pytest.approx(arrays[f"alpha_{rule}"].tolist(), abs=5e-5)


def test_published_balance(recorded):
    arrays, shapes = recorded
    gammas = balance(arrays["kl_all"].abs().mean(0), scale_weights(shapes))
    torch.testing.assert_close(gammas, arrays["balanced_kl_coeffs"], rtol=5e-5, atol=5e-5)


def test_scales_are_told_by_shape():
    """Two scales of one and two groups: 1/1 and 4/2; flat latents are all of one scale."""
    assert scale_weights([(2, 4, 4), (2, 8, 8), (2, 8, 8)]) == [1, 2, 2]
    assert scale_weights([(5,), (5,), (5,)]) == [1, 1, 1]


def test_balance_leaves_the_mean():
    """Equal groups are left alone; a collapsed one counts next to nothing, not nothing."""
    kls = torch.tensor([3.0, 3.0, 3.0], dtype=torch.float64, requires_grad=True)
    found = balance(kls, [1, 1, 1])
    assert found.tolist() == [1, 1, 1] and not found.requires_grad
    collapsed = balance(torch.tensor([0.0, 9.0], dtype=torch.float64), [1, 1])
    assert collapsed.tolist() == pytest.approx([2 * 0.01 / 9.02, 2 * 9.01 / 9.02])


def test_unknown_rule():
    with pytest.raises(ValueError, match=r"rule must be one of .*got 'cubic'"):
        scale_weights([(1,)], "cubic")
