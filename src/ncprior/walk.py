"""The walk: the protocol that a VAE offers, and the one loop over its latent groups.

A hierarchical VAE is a chain of K groups; a flat VAE is a chain of one. Training, sampling,
drawing pairs for the classifiers and measuring a likelihood are the same loop; they differ only
in how z_k is chosen.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Generator, Tensor

from ncprior.normal import Normal

Evidence = tuple[Tensor, ...]
"""What an encoder says of a batch of images: tensors whose first axis is the image."""


class Density(Protocol):
    """A normalised density in the language of `torch.distributions`, with explicit generators."""

    @property
    def batch_shape(self) -> tuple[int, ...]: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, *batch_shape, *event_shape), without gradient."""
        ...

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats, the shape of `value` less `event_shape`."""
        ...

    def tempered(self, temperature: float) -> "Density":
        """The density with its standard deviation times `temperature`."""
        ...


class RowDensity(Density, Protocol):
    """A density whose batch axis is the row of the walk."""

    def tempered(self, temperature: float) -> "RowDensity": ...

    def row(self, index: int) -> Density:
        """The density of one row, with batch shape ()."""
        ...


class Posterior(Protocol):
    """q(z_k | z_<k, x), whose batch axis is the row of the walk.

    A posterior made of flows knows log q cheaply at its own draws only, so that whoever needs both
    asks for them together.
    """

    @property
    def batch_shape(self) -> tuple[int, ...]: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, *batch_shape, *event_shape), without gradient."""
        ...

    def rsample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """The same, differentiable in the posterior's parameters."""
        ...

    def rsample_and_log_prob(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """The draws of `rsample` and log q there in nats, (*sample_shape, *batch_shape)."""
        ...

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats anywhere; may be slow."""
        ...

    def row(self, index: int) -> "Posterior":
        """The posterior of one row, with batch shape ()."""
        ...


class Repeated:
    """The same density, of batch shape (), for each of `num` rows."""

    def __init__(self, density: Any, num: int) -> None:
        self.density, self.num = density, num

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return (self.num,)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.density.event_shape

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        return self.density.sample((*sample_shape, self.num), generator=generator)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.density.log_prob(value)

    def tempered(self, temperature: float) -> Self:
        return type(self)(self.density.tempered(temperature), self.num)

    def row(self, index: int) -> Density:
        return self.density


class Group(NamedTuple):
    """One latent group, given the groups before it, for n rows."""

    prior: RowDensity  # p(z_k | z_<k), batch_shape (n,)
    posterior: Posterior | None  # q(z_k | z_<k, x), batch_shape (n,); None without evidence
    context: Tensor | None  # c(z_<k), (n, ...), what the prior's parameters are made of

    def standardize(self, z: Tensor, rows: slice = slice(None)) -> Tensor:
        """z (n, *event) or (n, m, *event) of some rows, in the coordinate that ratios see.

        Where a normal prior varies with the context it is the one in which that prior is N(0, I):
        a ratio of densities is the same in every coordinate, and this one is the easiest to learn.
        """
        if self.context is None or not isinstance(self.prior, Normal):
            return z
        loc, scale = self.prior.loc[rows], self.prior.scale[rows]
        if z.ndim > loc.ndim:
            loc, scale = loc[:, None], scale[:, None]
        return (z - loc) / scale


class VAE(Protocol):
    """What a VAE must offer; this is all that an adapter writes."""

    @property
    def num_groups(self) -> int: ...

    def encode(self, images: Tensor) -> Evidence:
        """Images (n, c, h, w) in [0, 1] to the evidence for their posteriors."""
        ...

    def start(self, num: int) -> Any:
        """The state in which no group is chosen yet, for `num` rows."""
        ...

    def group(self, state: Any, evidence: Evidence | None = None) -> Group:
        """The next group: its prior, its context and, with evidence, its posterior."""
        ...

    def advance(self, state: Any, z: Tensor) -> Any:
        """The state after z (n, *event) was chosen for the next group."""
        ...

    def emit(self, state: Any) -> Any:
        """The likelihood p(x | z), once all groups are chosen."""
        ...


@contextmanager
def evaluating(vae: Any) -> Iterator[None]:
    """Evaluation mode for a while; afterwards each part is in the mode that it was in."""
    modes = [(part, part.training) for part in vae.modules()]
    vae.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def device_of(vae: Any) -> torch.device:
    """Where a VAE's tensors are; the CPU for one that has none."""
    for tensor in itertools.chain(vae.parameters(), vae.buffers()):
        return tensor.device
    return torch.device("cpu")


Choose = Callable[[int, Group], Tensor]


class Walked(NamedTuple):
    """The end of a walk."""

    state: Any
    latents: list[Tensor]  # one (n, *event) per group


def walk(
    vae: VAE,
    choose: Choose,
    num: int,
    evidence: Evidence | None = None,
    groups: int | None = None,
) -> Walked:
    """Go through the groups of `vae` for `num` rows; `choose(k, group)` picks each z_k.

    With `groups` the walk ends after that many.
    """
    state, latents = vae.start(num), []
    for k in range(vae.num_groups if groups is None else groups):
        z = choose(k, vae.group(state, evidence))
        state = vae.advance(state, z)
        latents.append(z)
    return Walked(state, latents)


def from_prior(generator: Generator | None = None, temperature: float = 1.0) -> Choose:
    """Draw each group from the base prior, its standard deviation times `temperature`."""
    return lambda _, group: group.prior.tempered(temperature).sample(generator=generator)


def from_posterior(generator: Generator | None = None) -> Choose:
    """Draw each group from the posterior."""

    def choose(_: int, group: Group) -> Tensor:
        if group.posterior is None:
            raise ValueError("from_posterior needs a walk with evidence; pass vae.encode(images)")
        return group.posterior.rsample(generator=generator)

    return choose


def from_list(latents: Sequence[Tensor]) -> Choose:
    """Take each group from `latents`, those of another model perhaps."""
    return lambda k, _: latents[k]
