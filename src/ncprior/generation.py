"""Draw images from the base prior, a noise contrastive prior or the aggregate posterior."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

from ncprior.groups import check_groups
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.readjustment import readjusted
from ncprior.samplers import annealed, langevin, sir
from ncprior.samplers.annealed import MOVES, PARTICLES
from ncprior.samplers.sir import NATS, block_for, enough_proposals
from ncprior.training.progress import progress_bar
from ncprior.walk import Choose, Group, device_of, evaluating, walk

AUTO = "auto"
PILOT_DRAWS, PILOT_PROPOSALS = 16, 500

Pool = int | str | Sequence[int]


class Draws(NamedTuple):
    """Generated images and how they came about."""

    images: Tensor  # (n, c, h, w) in [0, 1], means of the likelihood, on the CPU
    latents: list[Tensor]  # K tensors (n, *event), on the CPU
    ess: Tensor  # (K, n), effective pool sizes of SIR, smallest ones of annealing; NaN elsewhere


def generate(vae: Any, prior: NoiseContrastivePrior | None, num: int, **options: Any) -> Tensor:
    """Images (num, c, h, w) in [0, 1]; the arguments are those of `draw`."""
    return draw(vae, prior, num, **options).images


@torch.no_grad()
def draw(
    vae: Any,
    prior: NoiseContrastivePrior | None = None,
    num: int = 64,
    *,
    sampler: str = AUTO,
    groups: str | Sequence[int] | None = None,
    proposals: Pool = AUTO,
    temperature: float = 1.0,
    batch_norm_passes: int = 0,
    steps: int = 500,
    step_size: float = 0.1,
    final_step_size: float | None = 0.005,
    particles: int = PARTICLES,
    moves: int = MOVES,
    images: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
    bfloat16: bool = False,
    batch_size: int = 500,
    chunk: int | None = None,
    progress: bool = False,
) -> Draws:
    """Draw latents by one walk and decode them. Draw i depends on `seed` and i alone.

    Args:
        vae: Any VAE that offers the walk; put into evaluation mode for the duration.
        prior: The noise contrastive prior; None for the VAE's own.
        num: Number of images.
        sampler: "sir", "langevin" or "annealed". Annealing reaches laws so far from the base that
            SIR finds next to no proposal there, stage by stage where the ratio has stages; "auto"
            takes it for these, and SIR for all others.
        groups: Latent groups that use the NCP, such as "0-4" or [0, 1]; all that were fitted by
            default. The top ones matter most (section 5.4 of the paper), and the last may be
            unreliable.
        proposals: SIR's pool for each draw, or one size for each group. "auto" takes as few as
            keep the law of the latents within 0.1 nats of the NCP's, at most 1,000 a group (see
            `pool_sizes`).
        temperature: Factor on the standard deviation of the base prior.
        batch_norm_passes: Batches of base samples at `temperature` from which a copy of the VAE
            takes new batch-norm statistics (500 in NVAE); 0 leaves them. Not for reconstructions.
        steps: Langevin updates, from a draw of the base prior.
        step_size: Langevin's first lambda.
        final_step_size: Langevin's last; None for a constant one.
        particles: Pool of each draw in annealing. Ratios in stages were fitted with the default.
        moves: Langevin steps of each particle there, at each temperature.
        images: Images (m, c, h, w): draw from their aggregate posterior instead of a prior, which
            gives reconstructions.
        seed: Seed of everything drawn.
        first: Number of the first draw, to go on from where an earlier call ended.
        bfloat16: Let SIR weigh proposals in bfloat16: faster on some machines, with ratios off by
            about a percent.
        batch_size: Images at a time; it changes memory, not the images.
        chunk: Proposals that SIR weighs at a time.
        progress: Show a progress bar.

    Raises:
        ValueError: an argument out of range, an unknown sampler, or a prior for another VAE.
    """
    _check(num=num, temperature=temperature, batch_size=batch_size)
    _check(particles=particles, moves=moves)
    if proposals != AUTO:
        proposals = _pools(proposals, vae.num_groups)
    sampler = sampler_of(prior, sampler)
    if images is not None and len(images) == 0:
        raise ValueError("images must hold at least one image to reconstruct, got none")
    if prior is not None:
        vae = prior.under(vae)
        prior = prior if groups is None else prior.only(check_groups(groups, vae.num_groups))
        prior = prior.in_bfloat16() if bfloat16 and sampler == "sir" else prior
    if batch_norm_passes and images is None:
        vae = readjusted(vae, batch_norm_passes, temperature=temperature, seed=seed)
    if proposals == AUTO:
        proposals = ()
        if prior is not None and images is None and sampler == "sir":
            proposals = pool_sizes(vae, prior, temperature=temperature)
    device = device_of(vae)
    options: dict[str, Any] = {
        "proposals": proposals,
        "chunk": chunk,
        "steps": steps,
        "step_size": step_size,
        "final_step_size": final_step_size,
        "particles": particles,
        "moves": moves,
    }
    what = "reconstructing" if images is not None else f"sampling {'NCP' if prior else 'base'}"
    batches = []
    with evaluating(vae), progress_bar(what, num, shown=progress) as bar:
        for done in range(0, num, batch_size):
            count = min(batch_size, num - done)
            streams = _Streams(seed, first + done, count, device)
            batches.append(_batch(vae, prior, streams, sampler, temperature, images, options))
            bar(done + count)
    groups = range(vae.num_groups)
    return Draws(
        torch.cat([b.images for b in batches]),
        [torch.cat([b.latents[k] for b in batches]) for k in groups],
        torch.cat([b.ess for b in batches], 1),
    )


def sampler_of(prior: NoiseContrastivePrior | None, sampler: str = AUTO) -> str:
    """What `draw` makes of its argument; see there."""
    if sampler == AUTO:
        return "annealed" if prior is not None and prior.in_stages else "sir"
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of auto, {', '.join(SAMPLERS)}, got {sampler!r}")
    return sampler


@torch.no_grad()
def pool_sizes(
    vae: Any, prior: NoiseContrastivePrior, *, temperature: float = 1.0
) -> tuple[int, ...]:
    """How many proposals SIR needs in each latent group, (K,), by `enough_proposals`.

    The 0.1 nats are shared evenly among the fitted groups. What share of proposals counts is known
    from the fit where there is one group and one stage; elsewhere 16 draws from pools of 500 tell,
    whose seed is fixed, so that draws depend on theirs alone.

    Args:
        vae: A VAE on the prior's base.
        prior: The noise contrastive prior.
        temperature: Factor on the standard deviation of the base prior.
    """
    vae, known = prior.under(vae), prior.log_z
    if vae.num_groups == 1 and temperature == 1 and known is not None and not prior.in_stages:
        shares = [known.ess / known.num]
    else:
        pilot = draw(
            vae, prior, PILOT_DRAWS, sampler="sir", proposals=PILOT_PROPOSALS,
            temperature=temperature,
        )  # fmt: skip
        shares = (1 / (PILOT_PROPOSALS / pilot.ess).mean(1)).tolist()
    nats = NATS / max(1, len(prior.fitted_groups))
    return tuple(
        enough_proposals(share, nats) if k in prior.fitted_groups else 1
        for k, share in enumerate(shares)
    )


def _pools(proposals: Pool, groups: int) -> tuple[int, ...]:
    """A size for each group."""
    sizes = (proposals,) * groups if isinstance(proposals, int) else proposals
    if isinstance(sizes, str) or len(sizes) != groups or min(sizes) < 1:
        raise ValueError(
            f'proposals must be "auto", a positive number or {groups} of them (one a latent '
            f"group), got {proposals!r}"
        )
    return tuple(sizes)


class _Streams(list[Generator]):
    """A generator for each of `count` draws from number `first` on."""

    def __init__(self, seed: int, first: int, count: int, device: torch.device) -> None:
        super().__init__(stream(seed, "draw", first + i, device) for i in range(count))
        self.seed, self.first, self.device = seed, first, device

    def together(self, density: Any, size: int) -> Tensor:
        """The draws from blocks of `size` that begin at multiples of it, (count, *event)."""
        start, end = self.first // size, -(-(self.first + len(self)) // size)
        blocks = [
            density.sample((size,), generator=stream(self.seed, "draws together", b, self.device))
            for b in range(start, end)
        ]
        return torch.cat(blocks)[self.first - start * size :][: len(self)]


def _batch(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    generators: _Streams,
    sampler: str,
    temperature: float,
    images: Tensor | None,
    options: dict[str, Any],
) -> Draws:
    ess: list[Tensor] = []
    evidence = None
    if images is not None:
        device = generators[0].device
        picks = [torch.randint(len(images), (), generator=g, device=device) for g in generators]
        evidence = vae.encode(images[torch.stack(picks).cpu()].to(device))
        choose = _rows_of(lambda group: group.posterior, generators)
    elif prior is None:
        choose = _rows_of(lambda group: group.prior.tempered(temperature), generators)
    else:
        choose = SAMPLERS[sampler](prior, generators, temperature, ess, **options)
    walked = walk(vae, choose, len(generators), evidence)
    unknown = torch.full((len(generators),), torch.nan)
    sizes = ess or [unknown] * vae.num_groups
    return Draws(
        vae.emit(walked.state).mean.cpu(),
        [z.cpu() for z in walked.latents],
        torch.stack([size.cpu() for size in sizes]),
    )


def _rows_of(density: Callable[[Group], Any], generators: _Streams) -> Choose:
    """Draw each row from its own generator.

    A prior of which one draw takes as long as hundreds says so by `draws_together`; it is drawn in
    blocks that lie where they lie whatever is asked for, so that draw i stays what it is.
    """

    def choose(_: int, group: Group) -> Tensor:
        rows = density(group)
        size = getattr(rows.row(0), "draws_together", 1)
        if size > 1:
            return generators.together(rows.row(0), size)
        return torch.stack([rows.row(i).sample((), generator=g) for i, g in enumerate(generators)])

    return choose


def _by_sir(
    prior: NoiseContrastivePrior,
    generators: _Streams,
    temperature: float,
    ess: list[Tensor],
    *,
    proposals: Sequence[int],
    chunk: int | None,
    **_: Any,
) -> Choose:
    from_base = _rows_of(lambda group: group.prior.tempered(temperature), generators)

    def choose(k: int, group: Group) -> Tensor:
        if k not in prior.fitted_groups:
            ess.append(torch.full((len(generators),), torch.nan))
            return from_base(k, group)
        rows = group.prior.tempered(temperature)
        found = sir(
            lambda i, m, generator: rows.row(i).sample((m,), generator=generator),
            prior.weigher(k, group),
            len(generators),
            proposals[k],
            generator=generators,
            chunk=chunk or prior.chunk(k),
            block=block_for(rows.event_shape),
        )
        ess.append(found.ess)
        return found.samples

    return choose


def _by_langevin(
    prior: NoiseContrastivePrior,
    generators: _Streams,
    temperature: float,
    ess: list[Tensor],
    *,
    steps: int,
    step_size: float,
    final_step_size: float | None,
    **_: Any,
) -> Choose:
    from_base = _rows_of(lambda group: group.prior.tempered(temperature), generators)

    def choose(k: int, group: Group) -> Tensor:
        if k not in prior.fitted_groups:
            return from_base(k, group)
        rows, weigh = group.prior.tempered(temperature), prior.weigher(k, group)
        found = langevin(
            lambda z: weigh(z[:, None], slice(None))[:, 0] + rows.log_prob(z),
            from_base(k, group),
            steps=steps,
            step_size=step_size,
            final_step_size=final_step_size,
            generator=generators,
            scale=getattr(rows, "scale", 1.0),
        )
        return found.samples

    return choose


def _by_annealing(
    prior: NoiseContrastivePrior,
    generators: _Streams,
    temperature: float,
    ess: list[Tensor],
    *,
    particles: int,
    moves: int,
    chunk: int | None,
    **_: Any,
) -> Choose:
    from_base = _rows_of(lambda group: group.prior.tempered(temperature), generators)

    def choose(k: int, group: Group) -> Tensor:
        if k not in prior.fitted_groups:
            ess.append(torch.full((len(generators),), torch.nan))
            return from_base(k, group)
        rows = group.prior.tempered(temperature)
        if not hasattr(rows.row(0), "log_prob"):
            raise ValueError(
                f"sampler annealed needs a base whose density is known, not a "
                f"{type(rows.row(0)).__name__}; use sir"
            )

        def log_base(z: Tensor, draws: slice) -> Tensor:
            if group.context is None:  # the same for all rows
                return rows.row(0).log_prob(z)
            each = zip(range(len(generators))[draws], z, strict=True)
            return torch.stack([rows.row(i).log_prob(own) for i, own in each])

        found = annealed(
            lambda i, m, generator: rows.row(i).sample((m,), generator=generator),
            log_base,
            prior.stage_weighers(k, group),
            len(generators),
            particles,
            generator=generators,
            moves=moves,
            chunk=chunk or prior.chunk(k),
        )
        ess.append(found.ess)
        return found.samples

    return choose


SAMPLERS: dict[str, Callable[..., Choose]] = {
    "sir": _by_sir,
    "langevin": _by_langevin,
    "annealed": _by_annealing,
}


def _check(**positive: float) -> None:
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}")
