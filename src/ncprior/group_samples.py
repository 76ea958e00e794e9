"""Draws of each latent group from posterior, base prior and NCP, given the same earlier groups."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.data import ImageDataset
from ncprior.metrics import Features, pca, pixels
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.samplers import sir
from ncprior.samplers.sir import block_for
from ncprior.training.evidence import encode
from ncprior.training.progress import progress_bar
from ncprior.walk import Group, device_of, evaluating, from_prior, walk

COMPONENTS = 500  # principal components at most, as in section 5.4 of the paper
NUMBERS_AT_ONCE = 1 << 27  # half a GiB of draws


class GroupSamples(NamedTuple):
    """Draws of one group; row i of each was drawn given the same z_<k, that of image i.

    They are in the coordinate of `Group.standardize`, in which rows with different contexts can be
    pooled, and projected onto principal components where they are long. On the CPU.
    """

    posterior: Tensor  # (n, f)
    base: Tensor  # (n, f)
    ncp: Tensor | None  # (n, f); None where the group has no ratio
    ess: Tensor | None  # (n,), effective size of the pools that `ncp` was picked from


def group_samples(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    rows: Tensor,
    pilot_rows: Tensor,
    *,
    proposals: int = 100,
    seed: int = 0,
    batch_size: int = 500,
    progress: bool = False,
) -> Iterator[tuple[int, GroupSamples]]:
    """Walk along the posterior of images; at each group also draw from its prior and its NCP.

    Principal components are those of q and p pooled, as in the paper, but of other images: in many
    dimensions components fit the draws that they were computed from better than any others, which
    would set q apart from the NCP. Groups of at most 500 numbers are left as they are.

    Args:
        vae: Any VAE that offers the walk; put into evaluation mode for the duration.
        prior: The noise contrastive prior.
        data: Its images.
        rows: Rows of `data` to walk along, each once: more draws of one image would not be
            independent.
        pilot_rows: Other rows, whose draws give the principal components: 250 or more give all 500.
            Fewer are used where draws are very long.
        proposals: SIR's pool.
        seed: Seed of the draws, which do not depend on how many groups are held at a time.
        batch_size: Images at a time.
        progress: Show a progress bar.

    Yields:
        The number of each group, in order, and its draws.

    Reference: Aneja et al. (NeurIPS 2021), Table 9.
    """
    if proposals < 1:
        raise ValueError(f"proposals must be at least 1, got {proposals}")
    vae = prior.under(vae)
    sizes = [math.prod(shape) for shape in latent_shapes(vae)]
    passes = _passes(sizes, len(rows), len(pilot_rows))
    total = len(passes) * len(rows)
    with progress_bar("comparing groups", total, shown=progress) as bar:
        for i, groups in enumerate(passes):
            spaces = _spaces(vae, data, pilot_rows, groups, sizes, seed, batch_size)
            done = i * len(rows)
            report = lambda count, done=done: bar(done + count)
            drawn = _draw(vae, prior, data, rows, spaces, proposals, seed, batch_size, report)
            for k in groups:
                yield k, GroupSamples(*(_cat(parts) for parts in zip(*drawn.pop(k), strict=True)))


@torch.no_grad()
def latent_shapes(vae: Any) -> list[tuple[int, ...]]:
    """The event shape of each latent group."""
    with evaluating(vae):
        choose = from_prior(stream(0, "latent shapes", device=device_of(vae)))
        return [tuple(z.shape[1:]) for z in walk(vae, choose, 1).latents]


def _passes(sizes: Sequence[int], rows: int, pilot_rows: int) -> list[list[int]]:
    """Neighbouring groups whose draws fit into memory together; each list takes a walk of its own.

    What is held of a group is its pilot, and later what is compared.
    """
    found: list[list[int]] = []
    held = 0
    for k, size in enumerate(sizes):
        pilot = 2 * size * _pilot(size, pilot_rows) if size > COMPONENTS else 0
        own = max(pilot, 3 * rows * min(size, COMPONENTS))
        if not found or held + own > NUMBERS_AT_ONCE:
            found.append([])
            held = 0
        found[-1].append(k)
        held += own
    return found


def _pilot(size: int, rows: int) -> int:
    """Images for the principal components of a group of that size."""
    return max(2, min(COMPONENTS, rows, NUMBERS_AT_ONCE // (2 * size)))


@torch.no_grad()
def _spaces(
    vae: Any,
    data: ImageDataset,
    rows: Tensor,
    groups: Sequence[int],
    sizes: Sequence[int],
    seed: int,
    batch_size: int,
) -> dict[int, Features]:
    """The space in which each group is compared."""
    spaces = {k: pixels() for k in groups}
    wanted = {k: _pilot(sizes[k], len(rows)) for k in groups if sizes[k] > COMPONENTS}
    if not wanted:
        return spaces
    found: dict[int, list[Tensor]] = {k: [] for k in wanted}

    def visit(k: int, group: Group, z: Tensor, generator: Generator) -> None:
        if k not in wanted:
            return
        room = wanted[k] - sum(map(len, found[k])) // 2
        for x in (z, group.prior.sample(generator=generator)):
            found[k].append(group.standardize(x)[:room].flatten(1).float().cpu())

    _walk_along(vae, data, rows[: max(wanted.values())], max(wanted), visit, seed, 1, batch_size)
    for k in wanted:
        pooled = torch.cat(found.pop(k))
        spaces[k] = pca(pooled, min(COMPONENTS, len(pooled)))
    return spaces


@torch.no_grad()
def _draw(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    rows: Tensor,
    spaces: dict[int, Features],
    proposals: int,
    seed: int,
    batch_size: int,
    report: Callable[[int], None],
) -> dict[int, list[GroupSamples]]:
    """Draws of the groups in `spaces`, batch by batch."""
    drawn: dict[int, list[GroupSamples]] = {k: [] for k in spaces}

    def visit(k: int, group: Group, z: Tensor, generator: Generator) -> None:
        if k not in drawn:
            return
        other = group.prior.sample(generator=generator)
        at_q, at_p = (_project(spaces[k], group, x) for x in (z, other))
        if k not in prior.fitted_groups:
            drawn[k].append(GroupSamples(at_q, at_p, None, None))
            return
        found = sir(
            lambda i, m, generator: group.prior.row(i).sample((m,), generator=generator),
            prior.weigher(k, group),
            len(z),
            proposals,
            generator=generator,
            chunk=prior.chunk(k),
            block=block_for(group.prior.event_shape),
        )
        at_ncp = _project(spaces[k], group, found.samples)
        drawn[k].append(GroupSamples(at_q, at_p, at_ncp, found.ess.cpu()))

    _walk_along(vae, data, rows, max(spaces), visit, seed, 0, batch_size, report)
    return drawn


def _walk_along(
    vae: Any,
    data: ImageDataset,
    rows: Tensor,
    last: int,
    visit: Callable[[int, Group, Tensor, Generator], None],
    seed: int,
    which: int,
    batch_size: int,
    report: Callable[[int], None] = lambda _: None,
) -> None:
    """Walk along the posterior of images up to group `last`, and show each group to `visit`.

    Each group of each batch has a generator of its own, so that which others are visited changes
    nothing.
    """
    device, done = device_of(vae), 0
    with evaluating(vae):
        for i, part in enumerate(rows.split(batch_size)):
            at = 2 * i + which
            images = stream(seed, "group images", at)
            path = stream(seed, "group path", at, device)

            def choose(k: int, group: Group) -> Tensor:
                assert group.posterior is not None
                z = group.posterior.sample(generator=path)  # noqa: B023
                visit(k, group, z, stream(seed, f"group {k}", at, device))  # noqa: B023
                return z

            evidence = encode(vae, data, part, generator=images, device=device)
            walk(vae, choose, len(part), evidence, groups=last + 1)
            done += len(part)
            report(done)


def _project(space: Features, group: Group, z: Tensor) -> Tensor:
    return space(group.standardize(z)).float()


def _cat(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else torch.cat(list(parts))
