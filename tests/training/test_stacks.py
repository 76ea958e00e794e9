"""Groups of equal shape stacked for training give what each gives alone."""

import pytest
import torch

from ncprior.ratios import ConvRatio, ResidualRatio
from ncprior.training.pairs import Pairs
from ncprior.training.stacks import Stacks

LATENT, CONTEXT = (2, 4, 4), (3, 4, 4)


def conv(context):
    return ConvRatio(LATENT, context_shape=context, width=3, blocks=1)


def residual(context):
    return ResidualRatio(LATENT, context_shape=context, width=6, dropout=0.0, members=2)


@pytest.fixture(params=[conv, residual])
def networks(request, rng):
    """Four groups, of which the first has no context: stacks of one and of three."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return [request.param(None if k == 0 else CONTEXT).double() for k in range(4)]


@pytest.fixture
def pairs(rng):
    def draw(*shape):
        return torch.randn(8, *shape, generator=rng, dtype=torch.float64)

    return [Pairs(draw(*LATENT), draw(*LATENT), draw(*CONTEXT) if k else None) for k in range(4)]


@pytest.mark.parametrize("training", [True, False])
def test_together_as_apart(networks, pairs, training):
    together = Stacks(networks).train(training)
    assert [len(ks) for ks in together.places] == [1, 3]
    at_q, at_p = together(pairs)
    for k, network in enumerate(networks):
        alone = Stacks([network]).train(training)
        q, p = alone([pairs[k]])
        torch.testing.assert_close(at_q[k], q[0])
        torch.testing.assert_close(at_p[k], p[0])


def test_apart_again_in_order(networks):
    for before, after in zip(networks, Stacks(networks).ratios(), strict=True):
        assert before.config == after.config
        for name, value in before.state_dict().items():
            torch.testing.assert_close(after.state_dict()[name], value)


def test_weights_of_a_group_are_views(networks):
    """So that the best weights of one group can be kept without touching the others."""
    stacks = Stacks(networks)
    state = {name: value.clone() for name, value in stacks.state_dict().items()}
    for value in stacks.weights_of(state, 2).values():
        if value.ndim:
            value.zero_()
    stacks.load_state_dict(state)
    for k, (before, after) in enumerate(zip(networks, stacks.ratios(), strict=True)):
        for name, value in before.named_parameters():
            found = after.get_parameter(name)
            torch.testing.assert_close(found, torch.zeros_like(value) if k == 2 else value)
