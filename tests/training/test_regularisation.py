import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ncprior
from ncprior.training.regularisation import (
    NormPenalty,
    batch_norms,
    by_shape,
    convolution_weights,
    spectral_norms,
)
from ncprior.vaes.nvae.checkpoint import load_published

DATA = Path(__file__).resolve().parents[1] / "vaes" / "nvae" / "data"
TOLERANCE = 5e-5  # that of the recording


def error(found, expected):
    return abs(float(found) - float(expected)) / max(1, abs(float(expected)))


@pytest.fixture(params=["mnist-tiny", "cifar-tiny"], scope="module")
def recorded(request):
    """A checkpoint of the published program, its penalty at the recorded u, and its arrays."""
    told = json.loads((DATA / f"{request.param}.json").read_text())
    with np.load(DATA / f"{request.param}.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    vae = load_published(DATA / f"{request.param}.pt")
    start = {}
    for group in told["spectral_groups"]:
        rows, columns = group["matrix_shape"]
        start[f"u_{rows}x{columns}"] = arrays[f"spectral{group['index']:02d}_u_init"]
    return vae, start, arrays


@torch.no_grad()
def test_published_penalty(recorded):
    """40 iterations, 4 more from there, and 4 from the start; batch norms beside them."""
    vae, start, arrays = recorded
    penalty, factors = NormPenalty(vae), arrays["bn_loss"]
    penalty.load_state_dict(start)
    assert error(sum(m.weight.abs().max() for m in batch_norms(vae)), factors) < TOLERANCE
    assert error(penalty(vae, 40) - factors, arrays["spectral_loss_first"]) < TOLERANCE
    assert error(penalty(vae) - factors, arrays["spectral_loss_second"]) < TOLERANCE
    penalty.load_state_dict(start)
    assert error(penalty(vae) - factors, arrays["spectral_loss_4iter"]) < TOLERANCE


def test_published_norms_one_by_one(recorded):
    vae, start, arrays = recorded
    groups = by_shape(convolution_weights(vae))
    assert len(groups) == len(start)
    for i, (shape, weights) in enumerate(groups.items()):
        u = start[f"u_{shape[0]}x{shape[1]}"]
        _, u = spectral_norms(torch.stack(weights), u, 40)
        found, _ = spectral_norms(torch.stack(weights), u, 4)
        expected = arrays[f"spectral{i:02d}_sigma_second"]
        torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_power_iteration_reaches_the_largest_singular_value(rng):
    """From below, as does its gradient that of the norm."""
    matrices = torch.randn(3, 6, 11, generator=rng, dtype=torch.float64, requires_grad=True)
    u = torch.nn.functional.normalize(torch.randn(3, 6, generator=rng, dtype=torch.float64), dim=1)
    exact = torch.linalg.matrix_norm(matrices, ord=2)
    few, _ = spectral_norms(matrices, u, 2)
    many, u = spectral_norms(matrices, u, 2000)
    assert (few < many).all() and (few < exact).all()
    torch.testing.assert_close(many, exact)
    gradients = [
        torch.autograd.grad(x.sum(), matrices, retain_graph=True)[0] for x in (many, exact)
    ]
    torch.testing.assert_close(gradients[0], gradients[1])
    assert not u.requires_grad


def test_weights_next_to_nothing():
    """Vectors shorter than 1e-3 are divided by that: no direction is made of noise, nor NaN."""
    u = torch.tensor([[1.0, 0.0]])
    found, _ = spectral_norms(1e-4 * torch.eye(2)[None], u, 1)
    assert found.item() == pytest.approx(1e-4 * 0.1 * 0.01)  # v is 0.1 long, u then 0.01
    assert spectral_norms(torch.zeros(1, 2, 3), u, 4)[0].item() == 0


def test_any_vae_has_a_penalty():
    """Convolutions of both kinds and batch norms are found in modules; norms against an SVD."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = ncprior.build_vae((1, 8, 8), network="conv", channels=(3, 5), latent_size=2)
        for part in vae.modules():
            if isinstance(part, nn.BatchNorm2d):
                nn.init.normal_(part.weight)
    penalty = NormPenalty(vae)
    for _ in range(200):
        found = penalty(vae)
    expected = torch.zeros(())
    for part in vae.modules():
        if isinstance(part, nn.Conv2d):
            expected = expected + torch.linalg.matrix_norm(part.weight.flatten(1), ord=2)
        if isinstance(part, nn.ConvTranspose2d):
            weight = part.weight.transpose(0, 1)
            expected = expected + torch.linalg.matrix_norm(weight.flatten(1), ord=2)
        if isinstance(part, nn.BatchNorm2d):
            expected = expected + part.weight.abs().max()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert all(p.grad is not None for n, p in vae.named_parameters() if "blocks.0.weight" in n)


def test_a_vae_without_convolutions_has_none():
    assert (
        float(NormPenalty(ncprior.build_vae((1, 8, 8), hidden=(4,), latent_size=2))(nn.Module()))
        == 0
    )
