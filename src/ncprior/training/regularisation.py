"""NVAE's regulariser: spectral norms of convolutions and the largest factors of batch norms.

Both keep the outputs of a deep hierarchy from changing abruptly with its inputs.

Reference: Vahdat and Kautz, "NVAE: A Deep Hierarchical Variational Autoencoder" (NeurIPS 2020),
section 3.2 and the published program; power iteration as in Miyato et al. (2018).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

FIRST_ITERATIONS, LATER_ITERATIONS = 40, 4
EPSILON = 1e-3  # smallest norm by which a vector is divided


class NormPenalty(nn.Module):
    """Sum of the spectral norms of a VAE's convolutions and of max |gamma| of its batch norms.

    Convolutions count as matrices (out, in * kernel * kernel). Those of one shape are worked on
    together, and the left vectors u of their power iterations are kept from step to step.

    Args:
        vae: Any VAE. What it says by `convolution_weights()` and `batch_norms()` is penalised; else
            all its `nn.Conv2d` and `nn.ConvTranspose2d`, and all its `nn.BatchNorm2d`.
        generator: Source of the first u.
    """

    def __init__(self, vae: Any, *, generator: Generator | None = None) -> None:
        super().__init__()
        for shape, weights in by_shape(convolution_weights(vae)).items():
            start = torch.randn(len(weights), shape[0], generator=generator)
            start = F.normalize(start, dim=1, eps=EPSILON)
            self.register_buffer(_name(shape), start.to(weights[0]))

    def forward(self, vae: Any, iterations: int = LATER_ITERATIONS) -> Tensor:
        """The penalty as the weights of `vae` stand, differentiable in them; moves u on."""
        total = sum(norm.weight.abs().amax() for norm in batch_norms(vae))
        for shape, weights in by_shape(convolution_weights(vae)).items():
            kept = self.get_buffer(_name(shape))
            sigma, u = spectral_norms(torch.stack(weights), kept, iterations)
            kept.copy_(u)
            total = total + sigma.sum()
        return torch.as_tensor(total)


def spectral_norms(matrices: Tensor, u: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Largest singular values by power iteration: estimates from below that tighten.

    Args:
        matrices: (n, rows, columns).
        u: Left vectors to begin from, (n, rows).
        iterations: At least 1.

    Returns:
        Estimates (n,), whose gradient flows through the matrices alone, and the new u.
    """
    with torch.no_grad():
        fixed = matrices.detach()
        for _ in range(iterations):
            v = F.normalize(torch.einsum("nr,nrc->nc", u, fixed), dim=1, eps=EPSILON)
            u = F.normalize(torch.einsum("nrc,nc->nr", fixed, v), dim=1, eps=EPSILON)
    return (u * torch.einsum("nrc,nc->nr", matrices, v)).sum(1), u


def convolution_weights(vae: Any) -> list[Tensor]:
    """The weights (out, in, kernel, kernel) that the convolutions of `vae` use."""
    if hasattr(vae, "convolution_weights"):
        return vae.convolution_weights()
    found = []
    for part in vae.modules():
        if isinstance(part, nn.Conv2d):
            found.append(part.weight)
        elif isinstance(part, nn.ConvTranspose2d):
            found.append(part.weight.transpose(0, 1))
    return found


def batch_norms(vae: Any) -> list[Any]:
    """The batch norms of `vae` that have factors."""
    found = vae.batch_norms() if hasattr(vae, "batch_norms") else vae.modules()
    return [part for part in found if isinstance(part, nn.BatchNorm2d) and part.affine]


def by_shape(weights: Sequence[Tensor]) -> dict[tuple[int, int], list[Tensor]]:
    """Weights as matrices, together with those of the same shape, in the order they came."""
    shapes: dict[tuple[int, int], list[Tensor]] = {}
    for weight in weights:
        matrix = weight.flatten(1)
        shapes.setdefault((matrix.shape[0], matrix.shape[1]), []).append(matrix)
    return shapes


def _name(shape: tuple[int, int]) -> str:
    return f"u_{shape[0]}x{shape[1]}"
