"""What sampling runs in place of a convolutional ratio's layers: the same numbers."""

import pytest
import torch
from torch import nn

from ncprior.ratios import ConvRatio

SHAPES = [(3, 1, 1), (3, 2, 2), (3, 4, 4), (3, 3, 5), (3, 8, 8)]


def trained(shape, members=1, context=True, **options):
    """A network in float64 whose batch norms are not what they began as."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        of_context = (5, *shape[1:]) if context else None
        network = ConvRatio(shape, context_shape=of_context, members=members, width=4, **options)
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_()
                norm.running_var.uniform_(0.5, 2)
                if norm.affine:
                    nn.init.uniform_(norm.weight, 0.5, 2)
                    nn.init.normal_(norm.bias)
    return network.double().eval()


def draws(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both_ways(network):
    """log r with gradients, by the layers, and without, folded."""
    shape = network.latent_shape
    z = draws(2, 7, *shape)
    context = None if network.context_shape is None else draws(2, *network.context_shape, seed=2)
    before = z.clone()
    plain = network.weigh(z, network.embed(context)).detach()
    with torch.no_grad():
        folded = network.weigh(z, network.embed(context))
        again = network.weigh(z, network.embed(context))
    assert torch.equal(z, before) and torch.equal(folded, again)
    return plain, folded


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("members", "context"), [(1, True), (2, True), (2, False)])
def test_same_log_ratios(shape, members, context):
    plain, folded = both_ways(trained(shape, members, context, blocks=2))
    torch.testing.assert_close(folded, plain, rtol=1e-9, atol=1e-11)
    assert plain.std() > 1e-3  # there is something to get wrong


def test_changed_weights_are_noticed():
    """By an optimiser, by loading, by other running statistics and by another precision."""
    network = trained((3, 4, 4))
    first, _ = both_ways(network)

    def shift():
        network.trunk[0].convs[1].bias.add_(1.0)

    def load():
        network.load_state_dict({k: v * 0.9 for k, v in network.state_dict().items()})

    def norms():
        network.trunk[1].norms[0].running_mean.add_(0.5)

    for change in (shift, load, norms):
        with torch.no_grad():
            change()
        plain, folded = both_ways(network)
        torch.testing.assert_close(folded, plain, rtol=1e-9, atol=1e-11)
        assert (plain - first).abs().max() > 1e-3
        first = plain
    with torch.no_grad():
        single = network.float().weigh(draws(2, 7, 3, 4, 4).float(), network.embed(
            draws(2, 5, 4, 4, seed=2).float()))  # fmt: skip
    torch.testing.assert_close(single.double(), first, rtol=1e-4, atol=1e-5)


def test_training_mode_uses_the_layers():
    """Batch statistics, not those that were folded."""
    network = trained((3, 4, 4), context=False).train()
    z = draws(1, 9, 3, 4, 4)
    plain = network.weigh(z).detach()
    with torch.no_grad():
        torch.testing.assert_close(network.weigh(z), plain)
