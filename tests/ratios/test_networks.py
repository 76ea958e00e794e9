import pytest
import torch
from torch import nn

from ncprior.ratios import NETWORKS, MLPRatio, ResidualRatio
from ncprior.ratios.flat import EnsembleLinear, dropout

MAKERS = {
    "mlp": lambda members: MLPRatio(3, hidden=(8, 5), members=members),
    "residual": lambda members: ResidualRatio(3, width=8, dropout=0.5, members=members),
}


@pytest.fixture(params=MAKERS)
def make(request):
    """members -> an evaluated network in float64."""

    def build(members=3):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return MAKERS[request.param](members).double().eval()

    return build


@pytest.mark.parametrize("members", [1, 4])
def test_ensemble_linear_is_separate_layers(members, rng):
    ensemble = EnsembleLinear(members, 3, 5).double()
    nn.init.normal_(ensemble.bias, generator=rng)
    x = torch.randn(members, 7, 3, generator=rng, dtype=torch.float64)
    for e, out in enumerate(ensemble(x)):
        layer = nn.Linear(3, 5).double()
        layer.weight.data, layer.bias.data = ensemble.weight[e].T, ensemble.bias[e, 0]
        torch.testing.assert_close(out, layer(x[e]))


def test_members_are_independent(make, rng):
    """Member e's logits are those of a network that has its weights alone."""
    network, single = make(3), make(1)
    z = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    for e in range(3):
        weights = {k: v[e : e + 1] for k, v in network.named_parameters()}
        single.load_state_dict(weights | dict(network.named_buffers()))
        torch.testing.assert_close(single.member_logits(z)[0], network.member_logits(z)[e])


def test_log_ratio_is_the_calibrated_mean_of_members(make, rng):
    network, z = make(), torch.randn(6, 3, generator=rng, dtype=torch.float64)
    network.temperature.fill_(0.6)
    network.shift.fill_(-0.3)
    assert network.member_logits(z).shape == (3, 6)
    torch.testing.assert_close(network(z), 0.6 * network.member_logits(z).mean(0) - 0.3)


def test_rows_for_each_member(make, rng):
    network, z = make(), torch.randn(3, 6, 3, generator=rng, dtype=torch.float64)
    each = network.member_logits(z)
    for e in range(3):
        torch.testing.assert_close(each[e], network.member_logits(z[e])[e])


def test_inputs_are_standardised(make, rng):
    """Moving and scaling the latents changes nothing once `standardize` has seen them."""
    network, z = make(), torch.randn(50, 3, generator=rng, dtype=torch.float64)
    moved = z * torch.tensor([10.0, 0.1, 3.0]) - 4
    network.standardize(z)
    expected = network(z)
    network.standardize(moved)
    torch.testing.assert_close(network(moved), expected)


def test_a_constant_latent_does_not_divide_by_zero(make):
    network, z = make(), torch.ones(5, 3, dtype=torch.float64)
    network.standardize(z)
    assert network(z).isfinite().all()


def test_config_makes_the_same_network(make, rng):
    network = make()
    options = dict(network.config)
    other = NETWORKS[options.pop("network")](**options).double().eval()
    other.load_state_dict(network.state_dict())
    z = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    assert torch.equal(other(z), network(z))


def test_dropout_only_in_training(rng):
    network = MAKERS["residual"](2).double()
    z = torch.randn(6, 3, generator=rng, dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.equal(network(z), network(z))
    network.eval()
    assert torch.equal(network(z), network(z))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: MLPRatio(0), "latent_shape, members"),
        (lambda: MLPRatio(2, members=0), "latent_shape, members"),
        (lambda: MLPRatio(2, activation="gelu"), "activation must be one of tanh, relu, silu"),
        (lambda: ResidualRatio(2, width=0), "width and blocks"),
        (lambda: ResidualRatio(2, blocks=0), "width and blocks"),
        (lambda: ResidualRatio(2, dropout=1.0), "dropout in"),
    ],
)
def test_arguments(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_dropout_by_bytes(share):
    """About `share` of the numbers go, to 1/256, and the mean stays."""
    count = 200_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = dropout(torch.ones(count, dtype=torch.float64), share)
    zeroed = round(256 * share) / 256
    error = 4 * (zeroed * (1 - zeroed) / count) ** 0.5  # 4 standard errors
    assert abs(float((found == 0).double().mean()) - zeroed) < error
    assert float(found.max()) == pytest.approx(1 / (1 - zeroed))
    assert abs(float(found.mean()) - 1) < error / (1 - zeroed)


def test_scratch_memory_changes_nothing(make, rng):
    """Without gradient layers write into kept memory; a second call must not spoil the first."""
    network = make()
    z = torch.randn(50, 3, generator=rng, dtype=torch.float64)
    expected = network(z).detach()
    with torch.no_grad():
        first = network(z)
        network(-z)
    torch.testing.assert_close(first, expected)


def test_a_context_is_refused(make):
    with pytest.raises(ValueError, match="no context"):
        make()(torch.zeros(2, 3), torch.zeros(2, 1))
