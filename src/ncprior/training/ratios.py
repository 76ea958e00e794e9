"""Stage 2: freeze the VAE and train the classifiers between q(z) and p(z)."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from ncprior.data import ImageDataset, as_dataset
from ncprior.groups import check_groups, spell_groups
from ncprior.metrics import base_log_ratios
from ncprior.numerics import log_z, stream, stream_seed
from ncprior.priors import GaussianMixture, NoiseContrastivePrior
from ncprior.ratios import NETWORKS, RatioNetwork, UnitRatio, nce_loss
from ncprior.storage import fingerprint
from ncprior.training.evidence import EvidenceStream, EvidenceTable, encode, evidence_of
from ncprior.training.heldout import NUMBERS_AT_ONCE, HeldOut
from ncprior.training.keeping import Place
from ncprior.training.loop import optimise
from ncprior.training.order import RowOrder
from ncprior.training.pairs import Pairs, draw_pairs
from ncprior.training.presets import default_preset, fit_settings
from ncprior.training.processes import make_fabric
from ncprior.training.stacks import Stacks
from ncprior.training.verdict import calibrate_and_judge
from ncprior.walk import Density, evaluating

SEEN_IMAGES = 5000


class _RatioJob:
    """All classifiers of `groups` at the same time, from one walk of the frozen VAE a step."""

    def __init__(
        self,
        ratios: list[RatioNetwork],
        vae: Any,
        table: EvidenceTable | EvidenceStream,
        heldout: HeldOut,
        *,
        batch_size: int,
        patience: int,
        seed: int,
        noise_ratio: float = 1.0,
        of_vae: str = "",
    ) -> None:
        self.module = Stacks(ratios)
        self.vae, self.table, self.heldout = vae, table, heldout
        self.rows_per_step = batch_size * self.module.members
        self.order = RowOrder(torch.arange(len(table)), self.rows_per_step, seed=seed)
        self.noise_ratio, self.patience, self.of_vae = noise_ratio, patience, of_vae
        count = self.module.num_groups
        self.best_loss, self.best_step = [math.inf] * count, [0] * count
        self.since_best = [0] * count
        self.best_weights: dict[str, Tensor] = {}

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.table.advance(step)
        evidence = self.table[self.order(step).to(self.table.device)]
        pairs = draw_pairs(self.vae, evidence, self.rows_per_step, generator, self.heldout.groups)
        at_q, at_p = model(pairs)
        losses = nce_loss(at_q, at_p, self.noise_ratio)  # (K, E)
        return losses.sum(), {"train_loss": losses.mean()}

    def evaluate(self, step: int) -> dict[str, float]:
        found = self.logits(self.heldout)
        losses = [float(nce_loss(*at)) for at in found]
        state = self.module.state_dict()
        if not self.best_weights:
            self.best_weights = {name: value.clone() for name, value in state.items()}
        for k, loss in enumerate(losses):
            if self.since_best[k] >= self.patience:
                continue  # stopped, whatever the groups that go on make of it
            self.since_best[k] += 1
            if loss < self.best_loss[k]:
                self.best_loss[k], self.best_step[k], self.since_best[k] = loss, step, 0
                own = self.module.weights_of(state, k)
                for name, kept in self.module.weights_of(self.best_weights, k).items():
                    kept.copy_(own[name])
        figures = {"heldout_loss": sum(losses) / len(losses)}
        if len(losses) > 1:
            groups = self.heldout.groups
            figures |= {f"heldout_loss_{k}": x for k, x in zip(groups, losses, strict=True)}
        return figures

    @torch.no_grad()
    def logits(self, pairs: Iterable[list[Pairs]]) -> list[tuple[Tensor, Tensor]]:
        """Uncalibrated logits of each group at all its posterior and prior draws, each (n,)."""
        self.module.eval()
        pieces = []
        for part in pairs:
            for piece in _pieces(part, self.module):
                pieces.append(tuple(at.mean(1) for at in self.module(piece)))
        self.module.train()
        at_q, at_p = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
        return list(zip(at_q, at_p, strict=True))

    def should_stop(self) -> bool:
        return min(self.since_best) >= self.patience

    def identity(self) -> dict[str, Any]:
        return {
            "VAE (fingerprint)": self.of_vae,
            "groups": list(self.heldout.groups),
            "batch_size": self.rows_per_step,
            "training images": len(self.table),
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("best_loss", "best_step", "since_best", "best_weights")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        device = self.table.device
        self.best_weights = {name: v.to(device) for name, v in self.best_weights.items()}


def _pieces(pairs: list[Pairs], module: Stacks) -> Iterator[list[Pairs]]:
    """Rows of all groups a few thousand at a time."""
    rows = 2 * max(stack.chunk for stack in module.stacks)
    for first in range(0, len(pairs[0].posterior), rows):
        some = slice(first, first + rows)
        yield [
            Pairs(q[some], p[some], None if context is None else context[some])
            for q, p, context in pairs
        ]


def fit_prior(
    vae: Any,
    data: ImageDataset | Tensor,
    *,
    rows: Tensor | None = None,
    base: Density | str | None = None,
    groups: str | Sequence[int] | None = None,
    preset: str | None = None,
    network: str | None = None,
    network_options: dict[str, Any] | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    noise_ratio: float | None = None,
    clip_norm: float | None = None,
    heldout: float | None = None,
    patience: int = 10,
    refresh_passes: float = 4.0,
    log_z_draws: int | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    evaluate_every: int = 100,
    checkpoint_every: int = 1000,
    directory: Path | None = None,
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> NoiseContrastivePrior:
    """Fit a noise contrastive prior on a frozen VAE (section 4.2 of the paper).

    A held-out part of the images decides when to stop, calibrates the average of the members and
    gives the reported loss. The VAE is never changed.

    Args:
        vae: Any VAE that offers the walk.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        rows: Rows whose aggregate posterior is q(z), usually the VAE's training images; all by
            default.
        base: None or "gaussian" for the VAE's own prior, "mixture" for a Gaussian mixture of 10
            components fitted on draws of q(z), or any density. One latent group only.
        groups: Latent groups to fit, all by default; the others keep their base prior. They are
            independent: parts fitted apart are put together by `NoiseContrastivePrior.join`.
        preset: "small" (default below 20,000 images), "large" or "published" for flat latents;
            "groups" (default for latent maps, as in NVAE), "groups-small" or "groups-flat"; the
            arguments that follow change it.
        network: "residual", "mlp" or "conv".
        network_options: Arguments of that network, such as width, blocks, dropout, members.
        steps: Optimiser steps at most.
        batch_size: Posterior and prior draws per step for each member.
        learning_rate: Peak rate of AdamW; it falls along half a cosine.
        weight_decay: Decoupled weight decay.
        noise_ratio: How many times p counts in the training loss (`nce_loss`); what is reported is
            always Eq. 3, where it counts once.
        clip_norm: Largest gradient norm; none by default.
        heldout: Share of `rows` held out; that of the preset by default.
        patience: Evaluations without improvement after which a group stops.
        refresh_passes: Passes over the images in which the kept evidence of each is drawn anew,
            where the input is random.
        log_z_draws: Draws of the base prior from which log Z is estimated; 0 for none. By default
            200,000 for one group; with several, each draw takes a pass of the decoder.
        seed: Seed of all randomness.
        device: "auto", "cpu", "cuda" or "mps".
        precision: Lightning Fabric's.
        evaluate_every: Steps between evaluations.
        checkpoint_every: Steps between checkpoints.
        directory: Where checkpoints and logs go; nowhere by default.
        resume: Go on from the checkpoint in `directory`, if there is one.
        tensorboard: Also write TensorBoard logs.
        progress: Show a progress bar.

    Returns:
        The prior; its `record` says how it was fitted and what was found.

    Raises:
        ValueError: settings that cannot work, before any step.
    """
    if patience < 1:
        raise ValueError(f"patience must be at least 1 evaluation, got {patience}")
    if vae.num_groups > 1 and base not in (None, "gaussian"):
        raise ValueError("base needs a VAE with one latent group; hierarchical ones have their own")
    wanted = check_groups(range(vae.num_groups) if groups is None else groups, vae.num_groups)
    data = as_dataset(data)
    rows = torch.arange(len(data)) if rows is None else rows
    latent_maps = _has_latent_maps(vae)
    settings = fit_settings(
        preset or default_preset(len(rows), latent_maps),
        network_options,
        network=network,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        noise_ratio=noise_ratio,
        heldout=heldout,
    )
    rows_fit, rows_heldout = _split(rows, settings["heldout"], seed)
    fabric = make_fabric(device, precision, alone=True)
    device_ = fabric.device
    vae_fingerprint = fingerprint(vae)
    with evaluating(vae.to(device_)):
        if isinstance(base, str):
            base = _named_base(base, vae, data, rows_fit, seed, device_)
        vae = vae if base is None else vae.with_prior(base)
        held = HeldOut(vae, data, rows_heldout, wanted, seed=seed, device=device_)
        ratios = _new_ratios(settings, held, seed)
        rows_per_step = settings["batch_size"] * ratios[0].members
        table = evidence_of(
            vae,
            data,
            rows_fit,
            slices=max(1, round(refresh_passes * len(rows_fit) / rows_per_step)),
            seed=seed,
            device=device_,
        )
        job = _RatioJob(
            ratios,
            vae,
            table,
            held,
            batch_size=settings["batch_size"],
            patience=patience,
            seed=seed,
            noise_ratio=settings["noise_ratio"],
            of_vae=vae_fingerprint,
        )
        history = optimise(
            job,
            fabric,
            place=Place(
                directory,
                "ncp",
                resume,
                tensorboard,
                part=_part(None if groups is None else wanted),
            ),
            steps=settings["steps"],
            learning_rate=settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            clip_norm=clip_norm,
            seed=seed,
            evaluate_every=min(evaluate_every, settings["steps"]),
            checkpoint_every=checkpoint_every,
            description="fitting the prior",
            progress=progress,
        )
        job.module.load_state_dict(job.best_weights)
        job.module.eval().requires_grad_(False)

        numbers = sum(x[0].numel() for pair in held.example for x in pair if x is not None)
        seen = torch.arange(min(len(table), SEEN_IMAGES, NUMBERS_AT_ONCE // numbers + 1))
        generator = stream(seed, "seen", device=device_)
        seen_pairs = draw_pairs(vae, table[seen.to(device_)], len(seen), generator, wanted)
        fitted = dict(zip(wanted, job.module.ratios(), strict=True))
        judged = {
            k: calibrate_and_judge(*parts, heldout_images=len(rows_heldout), seed=seed)
            | {"best_step": int(job.best_step[i])}
            for i, (k, *parts) in enumerate(
                zip(wanted, fitted.values(), job.logits(held), job.logits([seen_pairs]), held.kls,
                    strict=True)
            )
        }  # fmt: skip
        every = range(vae.num_groups)
        prior = NoiseContrastivePrior(
            [fitted.get(k) or UnitRatio() for k in every], getattr(vae, "prior", None)
        )
        prior.eval().requires_grad_(False)
        prior.heldout_rows = rows_heldout
        prior.record = {
            "settings": settings,
            "seed": seed,
            "steps": int(history[-1]["step"]),
            "best_step": max(job.best_step),
            "fitted_images": len(rows_fit),
            "heldout_images": len(rows_heldout),
            "vae": vae_fingerprint,
            "groups": [judged.get(k) for k in every],
        }
        draws = log_z_draws if log_z_draws is not None else 200_000 if vae.num_groups == 1 else 0
        if draws:
            of_base = stream(seed, "log z", device=device_)
            prior.log_z = log_z(base_log_ratios(vae, prior, draws, generator=of_base))
        return prior


def _split(rows: Tensor, heldout: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out."""
    count = round(len(rows) * heldout)
    if count < 2 or len(rows) - count < 2:
        raise ValueError(
            f"heldout = {heldout} of {len(rows)} images leaves {len(rows) - count} to fit on and "
            f"{count} held out; both need at least 2, so pass more images or another share"
        )
    order = rows[torch.randperm(len(rows), generator=stream(seed, "heldout rows"))]
    return order[count:], order[:count]


def _named_base(
    name: str, vae: Any, data: Any, rows: Tensor, seed: int, device: torch.device
) -> Density | None:
    if name == "gaussian":
        return None
    if name != "mixture":
        raise ValueError(f'base must be "gaussian", "mixture" or a density, got {name!r}')
    evidence = encode(vae, data, rows, generator=stream(seed, "base images"), device=device)
    pairs = draw_pairs(vae, evidence, len(rows), stream(seed, "base", device=device))
    return GaussianMixture.fit(pairs[0].posterior, 10, seed=seed)


def _has_latent_maps(vae: Any) -> bool:
    """Whether latents are (c, h, w), as in NVAE, not flat."""
    with torch.no_grad(), evaluating(vae):
        return len(vae.group(vae.start(1)).prior.event_shape) == 3


def _part(groups: Sequence[int] | None) -> str:
    """What tells the files of a part from those of others, such as "-0-4"."""
    return "" if groups is None else f"-{spell_groups(groups)}"


def _new_ratios(settings: dict[str, Any], held: HeldOut, seed: int) -> list[RatioNetwork]:
    """A fresh network for each group, its weights a function of the seed and the group alone."""
    make, ratios = NETWORKS[settings["network"]], []
    for k, pair in zip(held.groups, held.example, strict=True):
        context = None if pair.context is None else pair.context.shape[1:]
        with torch.random.fork_rng([]):
            torch.manual_seed(stream_seed(seed, "ratio weights", k))
            ratio = make(
                pair.posterior.shape[1:], context_shape=context, **settings["network_options"]
            )
        ratios.append(ratio.to(pair.posterior))
    first = next(iter(held))
    for ratio, pair in zip(ratios, first, strict=True):
        ratio.standardize(torch.cat([pair.posterior, pair.prior]), pair.context)
    return ratios
