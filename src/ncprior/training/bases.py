"""What a noise contrastive prior may stand on, by name, and how a fit draws from it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ncprior.numerics import stream
from ncprior.priors import Codes, GaussianMixture, fit_density, parse_name
from ncprior.training.evidence import encode
from ncprior.training.progress import progress_bar
from ncprior.walk import Density, evaluating

STARTS = 2000
"""Images among which the pseudo-inputs of a VampPrior start."""
TABLED = 50_000
"""Draws that stand for a base from which each draw takes long."""
DRAWN_AT_ONCE = 1000


def check_base(base: Density | str | None, vae: Any) -> None:
    """Raise `ValueError` for a base that has no such name, or none for several latent groups."""
    if base in (None, "gaussian"):
        return
    if vae.num_groups > 1:
        raise ValueError("base needs a VAE with one latent group; hierarchical ones have their own")
    if isinstance(base, str):
        parse_name(base, "base")


def named_base(
    name: str,
    vae: Any,
    data: Any,
    rows: Tensor,
    *,
    seed: int,
    device: torch.device | str,
    progress: bool = False,
) -> Density | None:
    """The density of that name, fitted to the images in `rows`; None for the VAE's own prior."""
    if name == "gaussian":
        return None
    starts = data.batch(rows[:STARTS], generator=stream(seed, "base starts"))
    codes = codes_of(vae, data, rows, generator=stream(seed, "base images"), device=device)
    with progress_bar(f"fitting the base, {name}", 1, shown=progress) as bar:
        density: Density = fit_density(name, codes, vae=vae, images=starts.to(device), seed=seed)
        figures = None
        if isinstance(density, GaussianMixture):
            figures = {"components": float(len(density.means))}
        bar(1, figures)
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


def draws_slowly(vae: Any) -> bool:
    """Whether each draw of the base prior takes a chain, an equation or a pool of its own."""
    return getattr(getattr(vae, "prior", None), "slow_draws", False)


class _Table:
    """Draws of a base that were made beforehand, one at random in the place of each fresh one."""

    def __init__(self, draws: Tensor) -> None:
        self.draws = draws
        self.batch_shape, self.event_shape = (), tuple(draws.shape[1:])

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: torch.Generator | None = None
    ) -> Tensor:
        rows = torch.randint(
            len(self.draws), tuple(sample_shape), generator=generator, device=self.draws.device
        )
        return self.draws[rows]


def on_table(vae: Any, *, seed: int, device: torch.device | str, progress: bool) -> Any:
    """The VAE to take the steps of a fit with: on a table of draws where its base draws slowly.

    A fit sees millions of draws of p, as it sees millions of draws of q from thousands of images;
    with a table, draws of p come from as many points.
    """
    if not draws_slowly(vae):
        return vae
    generator, parts = stream(seed, "base table", device=device), []
    with progress_bar("drawing from the base", TABLED, shown=progress) as bar:
        for done in range(0, TABLED, DRAWN_AT_ONCE):
            count = min(DRAWN_AT_ONCE, TABLED - done)
            parts.append(vae.prior.sample((count,), generator=generator))
            bar(done + count)
    return vae.with_prior(_Table(torch.cat(parts)))
