import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncprior.vaes.nvae.cells import DecoderCell, DownSkip, EncoderCell
from ncprior.vaes.nvae.depthwise import depthwise_conv2d
from ncprior.vaes.nvae.layers import MaskedConv2d, NormedConv2d, recomputed


def test_weight_norm_starts_at_the_plain_convolution(rng):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = NormedConv2d(3, 4, 3).double()
    torch.testing.assert_close(conv.effective_weight(), conv.weight, rtol=1e-6, atol=0)
    x = torch.randn(2, 3, 5, 5, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))


def test_only_the_direction_of_the_weight_counts():
    conv = NormedConv2d(3, 4, 3).double()
    with torch.no_grad():
        before = conv.effective_weight().clone()
        conv.weight.mul_(3)
        conv.log_weight_norm.add_(1)
        ratio = conv.effective_weight() / before
    torch.testing.assert_close(ratio, torch.full_like(ratio, torch.e), rtol=1e-3, atol=0)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_masked_convolution_sees_what_is_before(strict, mirrored):
    """Its Jacobian, against the order written out: pixels by rows, then latent channels."""
    channels, side = 3, 4
    conv = MaskedConv2d(3, 6, 3, channels, strict=strict, mirrored=mirrored).double()
    x = torch.zeros(1, 3, side, side, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(conv, x)[0, :, :, :, 0]
    for c, i, j in torch.cartesian_prod(torch.arange(6), torch.arange(side), torch.arange(side)):
        for d, k, m in jacobian[c, i, j].nonzero():
            now, seen = (i * side + j, c // 2), (k * side + m, d)
            if mirrored:
                now, seen = (-now[0], now[1]), (-seen[0], seen[1])
            assert seen < now if strict else seen <= now
    neighbours = jacobian[:, 1, 1, :, :3, :3].flatten(2)  # of the pixel (1, 1)
    assert bool((neighbours[:, :, slice(5, 9) if mirrored else slice(0, 4)] != 0).all())


@pytest.mark.parametrize("side", [4, 12])  # both ways of computing the filter's gradient
@pytest.mark.parametrize("kernel", [3, 5])
def test_depthwise_gradients(side, kernel, rng):
    options = {"generator": rng, "dtype": torch.float64, "requires_grad": True}
    x, weight = (
        torch.randn(2, 3, side, side + 2, **options),
        torch.randn(3, 1, kernel, kernel, **options),
    )
    gradient = torch.randn(2, 3, side, side + 2, generator=rng, dtype=torch.float64)
    quick = depthwise_conv2d(x, weight)
    plain = F.conv2d(x, weight, padding=kernel // 2, groups=3)
    torch.testing.assert_close(quick, plain)
    ours = torch.autograd.grad(quick, (x, weight), gradient)
    torch.testing.assert_close(ours, torch.autograd.grad(plain, (x, weight), gradient))


def test_late_upsampling_is_the_same(rng):
    """The branch of an up cell repeats pixels after its expansion; before it gives the same."""
    cell = DecoderCell(8, up=True, expansion=3, squeeze_excitation=False).double()
    x = torch.randn(3, 8, 4, 4, generator=rng, dtype=torch.float64)
    for mode in (True, False):
        cell.train(mode)
        branch = cell.norm(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        branch = F.silu(cell.expand_norm(cell.expand(branch)))
        branch = cell.project(F.silu(cell.depthwise_norm(cell.depthwise(branch))))
        expected = cell.skip(x) + 0.1 * cell.project_norm(branch)
        torch.testing.assert_close(cell(x), expected, rtol=1e-3 if not mode else 1e-9, atol=1e-3)


def test_odd_channels_are_shared_out():
    skip = DownSkip(3, 6)
    assert [conv.out_channels for conv in skip.convs] == [1, 1, 1, 3]
    assert skip(torch.zeros(1, 3, 4, 6)).shape == (1, 6, 2, 3)


@pytest.mark.parametrize("se", [False, True])
def test_recomputed_cells_give_the_same(se, rng):
    """Values, gradients and running statistics, which move once."""
    results = []
    for through in (lambda cell, x: cell(x), recomputed):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            cell = EncoderCell(4, down=True, squeeze_excitation=se).double()
        x = torch.linspace(-1, 2, 2 * 4 * 6 * 6, dtype=torch.float64).view(2, 4, 6, 6)
        x.requires_grad_()
        through(cell, x).square().sum().backward()
        gradients = [p.grad for p in cell.parameters()]
        results.append([x.grad, *gradients, *cell.buffers()])
        norms = [m for m in cell.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(m.num_batches_tracked == 1 and m.momentum == 0.05 for m in norms)
    torch.testing.assert_close(*results, rtol=0, atol=0)
