import pytest
import torch

from ncprior.training.regularisation import NormPenalty
from ncprior.vaebm import EnergyNetwork, FlatEnergyNetwork, ImageEnergy
from ncprior.vaebm.network import NETWORKS


def small(kind):
    options = {"channels": (4, 6), "blocks": 2} if kind == "conv" else {"hidden": (8, 6)}
    return NETWORKS[kind]((2, 9, 8), **options).double()


def wake(network, rng):
    """Other weights than the zeros of the last layer."""
    with torch.no_grad():
        for parameter in network.parameters():
            shape = parameter.shape
            parameter.add_(0.3 * torch.randn(shape, generator=rng, dtype=parameter.dtype))


@pytest.mark.parametrize("kind", NETWORKS)
def test_energy_of_an_image_is_its_own(kind, rng):
    network, images = small(kind), torch.rand(5, 2, 9, 8, generator=rng, dtype=torch.float64)
    assert torch.equal(network(images), torch.zeros(5, dtype=torch.float64))
    wake(network, rng)
    energies = network(images)
    assert energies.shape == (5,) and energies.std() > 0
    torch.testing.assert_close(network(images[2:3]), energies[2:3])


@pytest.mark.parametrize("kind", NETWORKS)
def test_weights_are_normalised(kind, rng):
    """A layer's direction has no length: ten times as long a direction changes nothing."""
    network, images = small(kind), torch.rand(3, 2, 9, 8, generator=rng, dtype=torch.float64)
    wake(network, rng)
    before = network(images)
    for name, parameter in network.named_parameters():
        if name.endswith("original1"):
            parameter.data *= 10
    torch.testing.assert_close(network(images), before)


@pytest.mark.parametrize("kind", NETWORKS)
def test_penalty_is_the_sum_of_largest_singular_values(kind, rng):
    energy = ImageEnergy(small(kind), langevin_steps=1, step_size=0.1)
    wake(energy, rng)
    weights = [w.detach() for w in energy.convolution_weights()]
    # Blocks of two convolutions and, where the width changes, one past them; and the stem.
    assert len(weights) == (1 + 2 * 2 + 2 * 2 + 1 if kind == "conv" else 2)
    expected = sum(float(torch.linalg.matrix_norm(w.flatten(1), 2)) for w in weights)
    assert float(NormPenalty(energy, generator=rng)(energy, 2000).detach()) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnergyNetwork((1, 8, 8), channels=()), "channels must name widths"),
        (lambda: EnergyNetwork((1, 8, 8), blocks=0), "blocks be at least 1"),
        (lambda: EnergyNetwork((1, 8, 8), channels=(4,) * 5), "too many for images of 8x8"),
        (lambda: FlatEnergyNetwork((1, 8, 8), hidden=()), "hidden must name widths"),
    ],
)
def test_sizes_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
