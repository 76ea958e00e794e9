"""Batch-norm statistics for the decoder as it is used in sampling, not in training.

In training NVAE's decoder sees posterior draws; a prior of low temperature feeds it something else.
"""

import copy
from typing import Any

import torch
from torch import nn

from ncprior.numerics import stream
from ncprior.walk import device_of, from_prior, walk

KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def readjusted(
    vae: Any, passes: int, *, temperature: float = 1.0, batch_size: int = 16, seed: int = 0
) -> Any:
    """A copy of `vae` whose batch norms follow the statistics of samples of its base prior.

    Args:
        vae: Any VAE that offers the walk; it stays as it is.
        passes: Batches drawn, each of which moves the running statistics by their momentum.
        temperature: Factor on the standard deviation of the prior.
        batch_size: Images in each.
        seed: Seed of the draws.

    Raises:
        ValueError: passes or batch_size below 1, or a VAE without batch norms.

    Reference: Vahdat and Kautz (NeurIPS 2020): 500 passes of 16 images.
    """
    if passes < 1 or batch_size < 1:
        raise ValueError(f"passes and batch_size must be at least 1, got {passes}, {batch_size}")
    other = copy.deepcopy(vae).eval()
    norms = [module for module in other.modules() if isinstance(module, KINDS)]
    if not norms:
        raise ValueError("batch_norm_passes needs a VAE with batch norms, this one has none")
    for norm in norms:
        norm.train()
    choose = from_prior(stream(seed, "batch norm", device=device_of(vae)), temperature)
    for _ in range(passes):
        other.emit(walk(other, choose, batch_size).state)
    return other.eval()
