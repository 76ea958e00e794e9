"""Draws of each latent group from posterior, base prior and NCP, given the same earlier groups."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.data import ImageDataset
from ncprior.group_witness import Witness, fit_witness
from ncprior.metrics import Features, pca, pixels
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.training.evidence import encode
from ncprior.training.progress import progress_bar
from ncprior.walk import Group, device_of, evaluating, from_prior, walk

COMPONENTS = 500  # principal components at most, as in section 5.4 of the paper
NUMBERS_AT_ONCE = 1 << 27  # half a GiB of draws
POOL_NUMBERS = 1 << 22  # of proposals held at a time
DRAWS = 2  # of each image, by which witnesses are found and posteriors are averaged
WITNESS_IMAGES = 40  # at least, for a witness to be found
CONTEXT_AXES = 8  # principal components of the context that a witness sees


class GroupSamples(NamedTuple):
    """Draws of one group; row i of each was drawn given the same z_<k, that of image i.

    They are in the coordinate of `Group.standardize`, in which rows with different contexts can be
    pooled, and projected onto principal components where they are long. On the CPU.
    """

    posterior: Tensor  # (n, f)
    base: Tensor  # (n, f)
    ncp: Tensor | None  # (n, f); None where the group has no ratio
    ess: Tensor | None  # (n,), effective size of the pools that `ncp` was picked from
    gap_base: Tensor | None = None  # (n,), f at posterior draws less its mean under the base prior
    gap_ncp: Tensor | None = None  # (n,), the same under the NCP; f is the witness of the group


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
        pilot_rows: Other rows, whose draws give the principal components (250 or more give all
            500; fewer are used where draws are very long) and the witness (40 at least).
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
            seen = _witnesses(vae, data, pilot_rows, spaces, seed, batch_size)
            drawn = _draw(vae, prior, data, rows, spaces, seen, proposals, seed, batch_size, report)
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
        own = max(pilot, (3 * rows + 2 * DRAWS * pilot_rows) * min(size, COMPONENTS))
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

    few = rows[: max(wanted.values())]
    _walk_along(vae, data, few, max(wanted), visit, seed, "pilot", batch_size)
    for k in wanted:
        pooled = torch.cat(found.pop(k))
        spaces[k] = pca(pooled, min(COMPONENTS, len(pooled)))
    return spaces


class _Look(NamedTuple):
    """What a witness sees of the context of a group."""

    center: Tensor | None  # (g,); None without context
    axes: Tensor | None  # (g, 8), to numbers of unit size

    def __call__(self, context: Tensor | None) -> Tensor | None:
        """Contexts (n, ...) to (n, 8)."""
        if self.axes is None or self.center is None or context is None:
            return None
        return (context.flatten(1).float().cpu() - self.center) @ self.axes


class _Seen(NamedTuple):
    """The witness of a group, and what it sees of the context."""

    witness: Witness
    look: _Look


@torch.no_grad()
def _witnesses(
    vae: Any, data: ImageDataset, rows: Tensor, spaces: dict[int, Features], seed: int, batch: int
) -> dict[int, _Seen]:
    """The witness between posterior and prior of each group in `spaces`; none from few images."""
    if len(rows) < WITNESS_IMAGES:
        return {}
    drawn: dict[int, list[tuple[Tensor, Tensor, Tensor | None]]] = {k: [] for k in spaces}
    looks: dict[int, _Look] = {}

    def visit(k: int, group: Group, z: Tensor, generator: Generator) -> None:
        if k not in drawn:
            return
        if k not in looks:
            looks[k] = _context_axes(group.context)
        at_q, at_p = (
            _project(spaces[k], group, x)
            for x in (
                _posterior_draws(group, z, generator),
                group.prior.sample((DRAWS,), generator=generator).transpose(0, 1),
            )
        )
        drawn[k].append((at_q, at_p, looks[k](group.context)))

    _walk_along(vae, data, rows, max(spaces), visit, seed, "witness", batch)
    return {
        k: _Seen(fit_witness(*(_cat(parts) for parts in zip(*drawn.pop(k), strict=True))), looks[k])
        for k in spaces
    }


def _context_axes(context: Tensor | None) -> _Look:
    """Centre and principal axes of contexts (n, ...), scaled so that each gives unit size."""
    if context is None or len(context) <= CONTEXT_AXES:
        return _Look(None, None)
    flat = context.flatten(1).float().cpu()
    center = flat.mean(0)
    axes = torch.linalg.svd(flat - center, full_matrices=False).Vh[:CONTEXT_AXES].T
    return _Look(center, axes / ((flat - center) @ axes).std(0).clamp_min(1e-6))


def _posterior_draws(group: Group, z: Tensor, generator: Generator) -> Tensor:
    """The path's own draw and others of the same posterior, (n, DRAWS, *event)."""
    assert group.posterior is not None
    others = group.posterior.sample((DRAWS - 1,), generator=generator)
    return torch.cat([z[None], others]).transpose(0, 1)


@torch.no_grad()
def _draw(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset,
    rows: Tensor,
    spaces: dict[int, Features],
    seen: dict[int, _Seen],
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
        weigh = prior.weigher(k, group) if k in prior.fitted_groups else None
        own = seen.get(k)
        pool = _pool(group, weigh, own, spaces[k], proposals, prior.chunk(k), generator)
        gap_base = gap_ncp = picked = ess = None
        if own is not None:
            draws = _project(spaces[k], group, _posterior_draws(group, z, generator))
            at_q = own.witness(draws, own.look(group.context)).double().mean(1)
            gap_base = at_q - pool.heights.mean(1)
            if weigh is not None:
                gap_ncp = at_q - (pool.weights * pool.heights).sum(1)
        if weigh is not None:
            picked = _project(spaces[k], group, pool.picked[:, None])[:, 0]
            ess = 1 / pool.weights.square().sum(1)
        at_q, at_p = (_project(spaces[k], group, x[:, None])[:, 0] for x in (z, other))
        drawn[k].append(GroupSamples(at_q, at_p, picked, ess, gap_base, gap_ncp))

    _walk_along(vae, data, rows, max(spaces), visit, seed, "images", batch_size, report)
    return drawn


class _Pool(NamedTuple):
    """Proposals of each row: one picked by their ratios, their weights and witness values."""

    picked: Tensor  # (n, *event)
    weights: Tensor  # (n, m), float64, rows sum to 1; on the CPU as all that follows
    heights: Tensor  # (n, m), float64; zeros without a witness


def _pool(
    group: Group,
    weigh: Callable[[Tensor, slice], Tensor] | None,
    seen: _Seen | None,
    space: Features,
    proposals: int,
    chunk: int,
    generator: Generator,
) -> _Pool:
    """SIR as `samplers.sir` does it, which also shows all proposals to the witness.

    Its weighted mean over a pool is that of the pick, without the noise of picking one.
    """
    rows, size = group.prior.batch_shape[0], math.prod(group.prior.event_shape)
    at_once = max(1, POOL_NUMBERS // (rows * size))
    log_w, heights, picked, best = [], [], None, None
    context = None if seen is None else seen.look(group.context)
    for first in range(0, proposals, at_once):
        m = min(at_once, proposals - first)
        z = group.prior.sample((m,), generator=generator).transpose(0, 1)  # (n, m, *event)
        some = max(1, chunk // m)
        found = z.new_zeros(rows, m, dtype=torch.float64)
        if weigh is not None:
            parts = [slice(i, i + some) for i in range(0, rows, some)]
            found = torch.cat([weigh(z[part], part).double() for part in parts])
        noise = torch.rand(found.shape, generator=generator, device=z.device, dtype=torch.float64)
        score, at = (found - (-noise.log()).log()).max(1)
        candidate = z[torch.arange(rows, device=z.device), at]
        if best is None or picked is None:
            best, picked = score, candidate
        else:
            better = (score > best).view(-1, *[1] * (z.ndim - 2))
            picked, best = torch.where(better, candidate, picked), torch.maximum(best, score)
        log_w.append(found.cpu())
        if seen is not None:
            heights.append(seen.witness(_project(space, group, z), context).double())
    logs = torch.cat(log_w, 1)
    if not logs.amax(1).isfinite().all():  # amax keeps NaN
        raise ValueError("a pool has NaN, +inf or only -inf log-ratios")
    assert picked is not None
    return _Pool(picked, logs.softmax(1), torch.cat(heights, 1) if heights else logs * 0)


def _walk_along(
    vae: Any,
    data: ImageDataset,
    rows: Tensor,
    last: int,
    visit: Callable[[int, Group, Tensor, Generator], None],
    seed: int,
    which: str,
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
            images = stream(seed, f"group images, {which}", i)
            path = stream(seed, f"group path, {which}", i, device)

            def choose(k: int, group: Group) -> Tensor:
                assert group.posterior is not None
                z = group.posterior.sample(generator=path)  # noqa: B023
                visit(k, group, z, stream(seed, f"group {k}, {which}", i, device))  # noqa: B023
                return z

            evidence = encode(vae, data, part, generator=images, device=device)
            walk(vae, choose, len(part), evidence, groups=last + 1)
            done += len(part)
            report(done)


def _project(space: Features, group: Group, z: Tensor) -> Tensor:
    """z (n, m, *event) in the coordinate of the ratio and the space, (n, m, f), on the CPU."""
    return space(group.standardize(z).flatten(0, 1)).float().unflatten(0, z.shape[:2])


def _cat(parts: Sequence[Any]) -> Any:
    return None if parts[0] is None else torch.cat(list(parts))
