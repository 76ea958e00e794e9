"""A decoder whose layers have a spectral norm of at most 1, while it is trained and afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from ncprior.numerics import stream_seed

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
NORMALISED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@contextmanager
def spectral_normalised(module: nn.Module, *, wanted: bool = True, seed: int = 0) -> Iterator[None]:
    """Divide the weights of all linear layers and convolutions by their spectral norms, within.

    A convolution counts as its matrix (out, in * kernel). The norm is that of one power iteration a
    step. On leaving, each layer has a plain weight again, whose norm is at most 1 exactly, so that
    the module is saved and read like any other.

    Args:
        module: What is normalised, in place.
        wanted: False leaves everything as it is.
        seed: Seed of the first vectors.

    Raises:
        ValueError: the module has no such layer, or one that is parametrised already.

    Reference: Miyato et al. (ICLR 2018), Algorithm 1.
    """
    if not wanted:
        yield
        return
    layers = [layer for layer in module.modules() if isinstance(layer, NORMALISED)]
    if not layers or any(parametrize.is_parametrized(layer) for layer in layers):
        raise ValueError(
            "a module to be normalised must have linear layers or convolutions, none of them "
            f"parametrised; got {type(module).__name__}"
        )
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(seed, "spectral norms"))
        for layer in layers:
            spectral_norm(layer)
    try:
        yield
    finally:
        for layer in layers:
            _make_plain(layer)


def layer_norms(module: nn.Module) -> Tensor:
    """The largest singular value of each linear layer and convolution of `module`, (layers,)."""
    layers = [layer for layer in module.modules() if isinstance(layer, NORMALISED)]
    return torch.stack([_norm(layer) for layer in layers])


@torch.no_grad()
def _make_plain(layer: nn.Module) -> None:
    """The weight as it is in evaluation, without what power iteration fell short of its norm."""
    layer.eval()
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    bias = layer._parameters.pop("bias")
    layer.register_parameter("bias", bias)  # after the weight again, as it was
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if weight.isfinite().all():  # else training says so itself
        weight.div_(_norm(layer).clamp_min(1))


def _norm(layer: nn.Module) -> Tensor:
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment, operator]
    matrix = weight.transpose(0, 1) if isinstance(layer, TRANSPOSED) else weight
    return torch.linalg.matrix_norm(matrix.flatten(1), 2)
