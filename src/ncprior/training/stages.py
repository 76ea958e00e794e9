"""A ratio in stages: each classifier tells q(z) from draws of the prior that the last ones made.

Where base prior and posterior hardly overlap, one classifier separates them perfectly and its
logit says little of log q / p. It still says in which direction q lies. So a population of draws of
p goes there (`samplers.annealed`), a second classifier tells q from it, and so on, until none can.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ncprior.numerics import log_z, stream, stream_seed
from ncprior.priors import PRIORS, parse_name
from ncprior.ratios import SummedRatio
from ncprior.ratios.nce import LOG_2
from ncprior.samplers.annealed import MOVES, PARTICLES, anneal
from ncprior.training.checkpoints import load_checkpoint, save_checkpoint
from ncprior.training.heldout import HeldOut
from ncprior.training.keeping import Place
from ncprior.training.loop import optimise
from ncprior.training.pairs import Pairs, draw_pairs
from ncprior.training.ratio_job import Fitted, RatioJob, log_ratios, new_ratios, seen_pairs
from ncprior.training.verdict import calibrate_and_judge

ADAPTIVE = "adaptive"
MOST_STAGES = 16
INDISTINGUISHABLE_JSD = 0.02  # nats, held out; below it another stage has nothing to learn
FAR_JSD = 0.1  # above it a user should know
POOLS, HELDOUT_POOLS = 96, 32  # to fit and to judge; each as a draw of `sampler="annealed"` has
KEPT: tuple[str, ...] = (
    "loss", "jsd", "jsd_interval", "train_loss", "temperature", "steps", "best_step", "levels",
    "acceptance", "pool_ess_share",
)  # fmt: skip
"""What is kept of each stage's figures."""


@dataclass
class _Population:
    """Draws of p r_1 ... r_t in pools of their own, (pools, m, *event), and log Z of each."""

    particles: Tensor
    log_z: Tensor
    figures: list[dict[str, Any]] = field(default_factory=list)

    def fitted(self) -> Tensor:
        return self.particles[:POOLS].flatten(0, 1)

    def heldout(self) -> Tensor:
        return self.particles[POOLS:].flatten(0, 1)


class _Against:
    """Held-out draws of the posterior against those of a population."""

    view = None

    def __init__(self, held: HeldOut, particles: Tensor) -> None:
        self.held, self.particles = held, particles
        self.groups, self.kls = held.groups, held.kls
        self.example = self._against(held.example)

    def __iter__(self) -> Iterator[list[Pairs]]:
        for pairs in self.held:
            yield self._against(pairs)

    def _against(self, pairs: list[Pairs]) -> list[Pairs]:
        posterior = pairs[0].posterior
        rows = torch.arange(len(posterior), device=posterior.device) % len(self.particles)
        return [Pairs(posterior, self.particles[rows], None)]


def check_stages(stages: int | str, vae: Any, base: Any = None) -> int:
    """How many stages at most.

    Args:
        stages: What `fit_prior` was given.
        vae: The VAE.
        base: What the prior is to stand on: a density, the name of one, or None for the VAE's own.

    Raises:
        ValueError: not a number of at least 1 or "adaptive"; several latent groups; or a base
            whose density is not known, which pools cannot be annealed from.
    """
    number = isinstance(stages, int) and not isinstance(stages, bool) and stages >= 1
    if not number and stages != ADAPTIVE:
        raise ValueError(f'stages must be a number of at least 1 or "adaptive", got {stages!r}')
    if stages != 1 and vae.num_groups > 1:
        raise ValueError("stages need a VAE with one latent group; fit hierarchical ones with 1")
    if stages != 1:
        density = vae.group(vae.start(1)).prior.row(0) if base is None else base
        kind = PRIORS[parse_name(base)[0]] if isinstance(base, str) else density
        if not hasattr(kind, "log_prob"):
            raise ValueError(f"stages need a base whose density is known, not {base or kind}")
    return MOST_STAGES if isinstance(stages, str) else stages


def fit_stages(
    vae: Any,
    table: Any,
    held: HeldOut,
    fabric: Any,
    *,
    stages: int | str,
    settings: dict[str, Any],
    patience: int,
    calibrate: bool,
    seed: int,
    of_vae: str,
    directory: Path | None,
    resume: bool,
    tensorboard: bool,
    **options: Any,
) -> Fitted:
    """Fit classifiers one after the other, each on what those before it left.

    With "adaptive", until one cannot tell held-out draws of q from those of the prior so far.

    What each classifier sees is what `sampler="annealed"` draws with its defaults, stragglers on
    the way included, so that its JSD judges those draws. The pools do not wait for equilibrium:
    log Z is what they estimate on the way, and tends to be too low (`metrics.estimate_log_z` has
    better ways).

    Args:
        vae: The frozen VAE on its base prior, in evaluation mode.
        table: Evidence of the images to fit on.
        held: Held-out images.
        fabric: Lightning Fabric.
        stages: A number, or "adaptive".
        settings: Those of `fit_settings`.
        patience: Evaluations without improvement after which a classifier stops.
        calibrate: Whether to calibrate each on held-out draws.
        seed: Seed of all randomness.
        of_vae: Fingerprint of the VAE.
        directory: Where checkpoints and logs go: one for each stage and, between stages, a
            checkpoint of all that are done.
        resume: Go on from there.
        tensorboard: Also write TensorBoard logs.
        options: Other arguments of `optimise`.

    Reference: Xiao and Han, "Adaptive multi-stage density ratio estimation for learning latent
        space energy-based model" (NeurIPS 2022, arXiv 2209.08739). Theirs train the generator too;
        here the pools are moved by an annealed sampler, which also gives log Z, and the number of
        stages is found on held-out images.
    """
    most = check_stages(stages, vae)
    base = vae.group(vae.start(1)).prior.row(0)
    generator = stream(seed, "population", device=fabric.device)
    start = base.sample((POOLS + HELDOUT_POOLS, PARTICLES), generator=generator)
    population = _Population(start, start.new_zeros(len(start), dtype=torch.float64))
    kept = Place(directory, "ncp").checkpoint
    identity = {"seed": seed, "stages": str(stages), "settings": str(settings), "vae": of_vae}
    done: list[dict[str, Tensor]] = []
    if resume and kept is not None and kept.exists():
        done, population = _restore(kept, identity, start.device)
    parts = []
    for t, weights in enumerate(done):
        (network,) = new_ratios(settings, _Against(held, start.flatten(0, 1)), _seed_of(seed, t))
        network.load_state_dict(weights)
        parts.append(network.eval().requires_grad_(False))

    while True:
        t, against = len(parts), _Against(held, population.heldout())
        place = Place(directory, f"ncp-stage-{t + 1}", resume, tensorboard)
        ratio, figures = _classifier(
            vae, table, against, fabric, population.fitted(), place,
            settings=settings, patience=patience, calibrate=calibrate, seed=_seed_of(seed, t),
            of_vae=of_vae, description=f"stage {t + 1}", **options,
        )  # fmt: skip
        told = figures["jsd"] > INDISTINGUISHABLE_JSD
        if t == most or (t > 0 and stages == ADAPTIVE and not told):
            _remove(place, kept)
            ratio = SummedRatio(parts)
            steps = sum(x["steps"] for x in [*population.figures, figures])
            seen = seen_pairs(vae, table, held, seed)
            judged = _judge(ratio, held, seen, population.figures, figures, seed)
            return Fitted({0: ratio}, {0: judged}, steps, log_z(population.log_z))
        population = _advance(population, base, parts, ratio, stream(seed, "stage", t))
        population.figures[-1] = figures | population.figures[-1]
        parts.append(ratio)
        if kept is not None:
            _keep(kept, identity, parts, population)
        _remove(place)


def _classifier(
    vae: Any,
    table: Any,
    against: _Against,
    fabric: Any,
    particles: Tensor,
    place: Place,
    *,
    settings: dict[str, Any],
    patience: int,
    calibrate: bool,
    seed: int,
    of_vae: str,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """A classifier between q and the population, calibrated, and what held-out draws say of it."""

    def draw(evidence: Any, num: int, generator: Generator) -> list[Pairs]:
        (pairs,) = draw_pairs(vae, evidence, num, generator)
        rows = torch.randint(len(particles), (num,), generator=generator, device=particles.device)
        return [Pairs(pairs.posterior, particles[rows], None)]

    job = RatioJob(
        new_ratios(settings, against, seed), vae, table, against,
        batch_size=settings["batch_size"], steps=settings["steps"], patience=patience, seed=seed,
        noise_ratio=settings["noise_ratio"], of_vae=of_vae, draw=draw,
    )  # fmt: skip
    history = optimise(
        job, fabric, place=place, steps=settings["steps"], learning_rate=settings["learning_rate"],
        warmup=settings["warmup"], weight_decay=settings["weight_decay"], seed=seed, **options,
    )  # fmt: skip
    job.module.load_state_dict(job.best_weights)
    job.module.eval().requires_grad_(False)
    seen = torch.arange(min(len(table), len(particles)), device=table.device)
    pairs = draw(table[seen], len(seen), stream(seed, "seen", device=table.device))
    ((at_q, at_p),), (of_seen,) = job.logits(against), job.logits([pairs])
    ratio = job.module.ratios()[0].eval().requires_grad_(False)
    figures = calibrate_and_judge(
        ratio,
        (at_q, at_p[: len(against.particles)]),  # each once
        of_seen,
        against.kls[0],
        heldout_images=against.held.images,
        seed=seed,
        fit=calibrate,
        most=1.0,  # where all is separated there is no largest: the pools would be torn apart
    )
    return ratio, figures | {"best_step": job.best_step[0], "steps": int(history[-1]["step"])}


def _advance(
    population: _Population, base: Any, parts: list[Any], ratio: Any, generator: Generator
) -> _Population:
    """The population under one ratio more, which is then normalised by what it finds."""

    def log_base(z: Tensor) -> Tensor:
        total = base.log_prob(z)
        for part in parts:
            total = total + part.weigh(z)
        return total

    device = population.particles.device
    pools = anneal(
        population.particles,
        log_base,
        [ratio.weigh],
        generators=[
            Generator(device).manual_seed(int(seed))
            for seed in torch.randint(2**31, (len(population.particles),), generator=generator)
        ],
        moves=MOVES,
    )
    estimate = log_z(pools.log_z)
    ratio.shift -= estimate.value
    found = {
        "levels": float(pools.levels.mean()),
        "acceptance": float(pools.acceptance.mean()),
        "pool_ess_share": float(pools.stage_ess.min()) / PARTICLES,
    }
    log_zs = population.log_z + pools.log_z - estimate.value
    return _Population(pools.particles, log_zs, [*population.figures, found])


def _judge(
    ratio: SummedRatio,
    held: HeldOut,
    seen: list[Pairs],
    stages: list[dict[str, Any]],
    left: dict[str, Any],
    seed: int,
) -> dict[str, Any]:
    """The figures of all stages together, of each, and of what is left."""
    heldout, of_seen = log_ratios(ratio, held), log_ratios(ratio, [seen])
    found = calibrate_and_judge(
        ratio, heldout, of_seen, held.kls[0], heldout_images=held.images, seed=seed, fit=False
    )
    found["warnings"] = []
    if left["jsd"] > FAR_JSD:
        found["warnings"] = [
            f"After {len(stages)} stages a classifier still tells draws of this prior from "
            f"held-out codes (JSD {left['jsd']:.3f} of at most {LOG_2:.3f} nats). "
            "More stages would help."
        ]
    return found | {
        "best_step": max(stage["best_step"] for stage in stages),
        "stages": [{key: stage[key] for key in KEPT if key in stage} for stage in stages],
        "left": {key: left[key] for key in KEPT if key in left},
    }


def _seed_of(seed: int, t: int) -> int:
    return stream_seed(seed, "stages", t)


def _keep(path: Path, identity: dict[str, Any], parts: list[Any], population: _Population) -> None:
    content = {
        "identity": identity,
        "parts": [part.state_dict() for part in parts],
        "particles": population.particles,
        "log_z": population.log_z,
        "figures": population.figures,
    }
    save_checkpoint(path, content)


def _restore(
    path: Path, identity: dict[str, Any], device: torch.device
) -> tuple[list[dict[str, Tensor]], _Population]:
    content = load_checkpoint(path)
    if content.get("identity") != identity:
        raise ValueError(
            f"the checkpoint {path} is of another run, with other settings or another VAE; use "
            "the old ones, or run without --resume"
        )
    population = _Population(
        content["particles"].to(device), content["log_z"].to(device), content["figures"]
    )
    return content["parts"], population


def _remove(*places: Any) -> None:
    """Remove checkpoints that are of no more use."""
    for place in places:
        path = place.checkpoint if isinstance(place, Place) else place
        if path is not None:
            path.unlink(missing_ok=True)
