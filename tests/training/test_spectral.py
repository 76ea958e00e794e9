import pytest
import torch
from torch import nn

from ncprior.training.spectral import layer_norms, spectral_normalised


def decoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Linear(3, 12), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 3, padding=1)]
        module = nn.Sequential(*layers, nn.ConvTranspose2d(4, 2, 5))
        for parameter in module.parameters():
            parameter.data *= 5
        return module.double()


def matrix(layer):
    """As it is normalised: outputs by all the rest."""
    weight = layer.weight
    weight = weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else weight
    return weight.reshape(weight.shape[0], -1)


def test_norms_are_one_within_and_afterwards(rng):
    module = decoder()
    before = [torch.linalg.svdvals(matrix(module[i]))[0] for i in (0, 2, 3)]
    torch.testing.assert_close(layer_norms(module), torch.stack(before).detach())
    assert min(before) > 1.5
    plain = list(module.state_dict())
    weights = [module[i].weight.detach().clone() for i in (0, 2, 3)]
    with spectral_normalised(module):
        for _ in range(200):  # each pass in training is a step of power iteration
            module(torch.zeros(1, 3).double())
        torch.testing.assert_close(layer_norms(module), torch.ones(3).double(), atol=1e-6, rtol=0)
        assert list(module.state_dict()) != plain
    assert list(module.state_dict()) == plain
    assert layer_norms(module).max() <= 1 + 1e-12
    for i, weight, norm in zip((0, 2, 3), weights, before, strict=True):
        torch.testing.assert_close(module[i].weight, weight / norm, atol=1e-6, rtol=0)
    with torch.random.fork_rng():
        copy = decoder()
        copy.load_state_dict(module.state_dict())
        z = torch.randn(2, 3, generator=rng, dtype=torch.float64)
        torch.testing.assert_close(copy(z), module(z), rtol=0, atol=0)
        difference = module[0](z[:1]) - module[0](z[1:])
        assert difference.norm() <= (z[0] - z[1]).norm() * (1 + 1e-12)


def test_what_power_iteration_missed_is_taken_off():
    """Leaving at once, after its few first rounds: the norm is at most 1 all the same."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Linear(200, 200).double()  # close singular values: slow to tell apart
    with spectral_normalised(module):
        module.eval()
        assert float(layer_norms(module)) > 1 + 1e-6
    assert float(layer_norms(module)) <= 1 + 1e-12


def test_left_alone_unless_wanted():
    module = decoder()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with spectral_normalised(module, wanted=False):
        pass
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_plain_again_after_an_error():
    module = decoder()
    with pytest.raises(KeyError), spectral_normalised(module):
        with torch.no_grad():
            module[0].parametrizations.weight.original.fill_(torch.nan)
        raise KeyError
    assert list(module.state_dict()) == list(decoder().state_dict())


def test_modules_without_layers():
    refused = pytest.raises(ValueError, match="linear layers or convolutions, none of them")
    with refused, spectral_normalised(nn.ReLU()):
        pass
    module, refused = decoder(), pytest.raises(ValueError, match="parametrised; got Sequential")
    with spectral_normalised(module), refused, spectral_normalised(module):
        pass
