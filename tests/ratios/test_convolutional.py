"""The convolutional ratio, its split first layer, and groups stacked into one network."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ncprior.ratios import ConvRatio, MLPRatio, ResidualRatio, UnitRatio, join, split

LATENT, CONTEXT = (3, 4, 4), (5, 4, 4)
MAKERS = {
    "conv": lambda **o: ConvRatio(LATENT, width=4, blocks=1, **o),
    "mlp": lambda **o: MLPRatio(LATENT, hidden=(8, 5), **o),
    "residual": lambda **o: ResidualRatio(LATENT, width=8, dropout=0.0, **o),
}


@pytest.fixture(params=MAKERS)
def make(request):
    """context, members -> a network in float64 whose buffers are not their initial values."""

    def build(context=CONTEXT, members=1, seed=0):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = MAKERS[request.param](context_shape=context, members=members).double()
            for buffer in network.buffers():
                if buffer.is_floating_point():
                    buffer.uniform_(0.5, 1.5)
        return network.eval()

    return build


def draws(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_first_layer_is_that_of_the_concatenation():
    """Separate convolutions of z and context, added, are one of both stacked on channels."""
    network = ConvRatio(LATENT, context_shape=CONTEXT, width=4, blocks=0, stages=1).double().eval()
    z, context = draws(6, *LATENT), draws(6, *CONTEXT, seed=2)
    both = torch.cat([z, network.context_norm(context)], 1)
    weight = torch.cat([network.stem.weight, network.context_stem.weight], 1)
    x = F.conv2d(both, weight, network.stem.bias, padding=1)
    expected = network.head(x.mean((2, 3), keepdim=True)).flatten()
    torch.testing.assert_close(network(z, context), expected * network.temperature + network.shift)


def test_published_shape():
    """Three stages of three blocks; the second and third begin by halving and doubling."""
    network = ConvRatio((20, 16, 16), context_shape=(8, 16, 16), width=4)
    x = network.stem(torch.zeros(2, 20, 16, 16))
    shapes = []
    for block in network.trunk:
        x = block(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 16, 16)] * 3 + [(8, 8, 8)] * 4 + [(16, 4, 4)] * 4
    assert network.head.weight.shape == (1, 16, 1, 1)


@pytest.mark.parametrize(("side", "halvings"), [(1, 0), (2, 1), (3, 1), (4, 2), (8, 2)])
def test_small_maps_end_the_halvings(side, halvings):
    network = ConvRatio((2, side, side), width=2, blocks=1)
    assert network.head.in_channels == 2 * 2**halvings
    assert network(torch.zeros(3, 2, side, side)).shape == (3,)


def test_gradient_reaches_z(make):
    network, context = make(), draws(2, *CONTEXT, seed=2)
    z = draws(2, *LATENT).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: network(z, context), z, atol=1e-5)


def test_weighing_many_is_weighing_each(make):
    """The embedded context of row i meets row i's proposals."""
    network = make(members=2)
    z, context = draws(2, 5, *LATENT), draws(2, *CONTEXT, seed=2)
    many = network.weigh(z, network.embed(context))
    for i in range(2):
        one = network(z[i], context[i].expand(5, -1, -1, -1))
        torch.testing.assert_close(many[i], one)
    with torch.no_grad():
        torch.testing.assert_close(network.weigh(z, network.embed(context)), many)


@pytest.mark.parametrize("context", [CONTEXT, None], ids=["context", "no context"])
@pytest.mark.parametrize("members", [1, 2])
def test_joined_networks_are_the_networks(make, members, context):
    """Logits of each in its place, in training too; and apart again they are as they were."""
    networks = [make(context, members, seed) for seed in range(3)]
    joined = join(networks)
    n = 6
    z = draws(3, members, 2 * n, *LATENT)
    c = None if context is None else draws(3, members, n, *CONTEXT, seed=2)
    for training in (False, True):
        for network in (joined, *networks):
            network.train(training)
        together = joined.member_logits(z.flatten(0, 1), None if c is None else c.flatten(0, 1))
        apart = [
            network.member_logits(z[k], None if c is None else c[k])
            for k, network in enumerate(networks)
        ]
        torch.testing.assert_close(together, torch.cat(apart))
    for network, again in zip(networks, split(joined), strict=True):
        assert again.config == network.config and again.groups == 1
        for name, value in network.state_dict().items():
            torch.testing.assert_close(again.state_dict()[name], value)


def test_joining_draws_no_random_numbers(make):
    state = torch.get_rng_state()
    split(join([make(), make()]))
    assert torch.equal(torch.get_rng_state(), state)


def test_members_see_rows_of_their_own(make):
    """One member's logits hang on nothing but its own rows."""
    network = make(members=2).train()
    z, context = draws(2, 4, *LATENT), draws(2, 4, *CONTEXT, seed=2)
    before = network.member_logits(z, context)
    z[1], context[1] = z[1] + 1, context[1] - 1
    after = network.member_logits(z, context)
    torch.testing.assert_close(after[0], before[0])
    assert not torch.allclose(after[1], before[1])


def test_context_is_checked(make):
    with pytest.raises(ValueError, match="takes a context"):
        make()(draws(2, *LATENT))
    with pytest.raises(ValueError, match="takes no context"):
        make(None)(draws(2, *LATENT), draws(2, *CONTEXT))


def test_unit_ratio():
    assert torch.equal(UnitRatio()(draws(4, *LATENT)), torch.zeros(4, dtype=torch.float64))
    assert not list(UnitRatio().parameters())


def test_chunk_falls_with_the_size_of_the_maps():
    small, large = (ConvRatio((2, s, s), width=16) for s in (4, 16))
    assert small.chunk == 16 * large.chunk > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: ConvRatio((3, 4, 4), width=0), "width and stages"),
        (lambda: ConvRatio((3,)), r"latent_shape must be \(channels, height, width\)"),
        (lambda: ConvRatio((3, 4, 4), context_shape=(5,)), "same height and width"),
        (lambda: ConvRatio((3, 4, 4), context_shape=(5, 8, 8)), "same height and width"),
        (lambda: ConvRatio((3, 4, 4), members=0), "must be at least 1"),
    ],
)
def test_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_batch_norm_follows_training():
    """Running statistics move in training only: evaluation is a function of z alone."""
    network = ConvRatio(LATENT, width=4, blocks=1).double()
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    network(draws(6, *LATENT))
    moved = [norm.running_mean.clone() for norm in norms]
    assert all(mean.abs().sum() > 0 for mean in moved)
    network.eval()(draws(6, *LATENT, seed=3))
    assert all(torch.equal(n.running_mean, m) for n, m in zip(norms, moved, strict=True))
