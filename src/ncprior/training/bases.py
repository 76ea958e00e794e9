"""What a noise contrastive prior may stand on, by name."""

from typing import Any

import torch
from torch import Tensor

from ncprior.numerics import stream
from ncprior.priors import PRIORS, Codes, fit_density
from ncprior.training.evidence import encode
from ncprior.walk import Density, evaluating

STARTS = 2000
"""Images among which the pseudo-inputs of a VampPrior start."""


def check_base(base: Density | str | None, vae: Any) -> None:
    """Raise `ValueError` for a base that has no such name, or none for several latent groups."""
    if base in (None, "gaussian"):
        return
    if vae.num_groups > 1:
        raise ValueError("base needs a VAE with one latent group; hierarchical ones have their own")
    if isinstance(base, str) and base not in PRIORS:
        raise ValueError(f"base must be one of {', '.join(PRIORS)} or a density, got {base!r}")


def named_base(
    name: str, vae: Any, data: Any, rows: Tensor, *, seed: int, device: torch.device | str
) -> Density | None:
    """The density of that name, fitted to the images in `rows`; None for the VAE's own prior."""
    if name == "gaussian":
        return None
    starts = data.batch(rows[:STARTS], generator=stream(seed, "base starts"))
    codes = codes_of(vae, data, rows, generator=stream(seed, "base images"), device=device)
    density: Density = fit_density(name, codes, vae=vae, images=starts.to(device), seed=seed)
    return density


def codes_of(
    vae: Any,
    data: Any,
    rows: Tensor,
    *,
    generator: torch.Generator,
    device: torch.device | str = "cpu",
) -> Codes:
    """What the encoder of a VAE with one latent group says of the images in `rows`."""
    with evaluating(vae):
        evidence = encode(vae, data, rows, generator=generator, device=device)
        posterior = vae.group(vae.start(len(rows)), evidence).posterior
    return Codes(posterior.loc, posterior.scale)
