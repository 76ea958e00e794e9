"""Stage 2: freeze the VAE and train the classifiers between q(z) and p(z)."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ncprior.data import ImageDataset, as_dataset
from ncprior.numerics import log_z, stream, stream_seed
from ncprior.priors import GaussianMixture, NoiseContrastivePrior
from ncprior.ratios import NETWORKS, RatioNetwork, nce_loss
from ncprior.storage import fingerprint
from ncprior.training.evidence import EvidenceTable, encode
from ncprior.training.loop import Place, make_fabric, optimise
from ncprior.training.order import RowOrder
from ncprior.training.pairs import Pairs, draw_pairs, log_ratios
from ncprior.training.presets import SMALL_DATA, fit_settings
from ncprior.training.vae import kl_divergence
from ncprior.training.verdict import calibrate_and_judge
from ncprior.walk import Density, Evidence, Group, evaluating, walk

HELDOUT_DRAWS = 10_000


class _Losses(nn.Module):
    """The NCE loss of every group, summed over its members: each learns from rows of its own."""

    def __init__(self, ratios: list[RatioNetwork], noise_ratio: float) -> None:
        super().__init__()
        self.noise_ratio = noise_ratio
        self.ratios: Any = nn.ModuleList(ratios)

    def forward(self, pairs: list[Pairs]) -> Tensor:
        """Losses (K, E) in nats."""
        losses = []
        for ratio, pair in zip(self.ratios, pairs, strict=True):
            members = ratio.members
            both = [z.unflatten(0, (members, -1)) for z in (pair.posterior, pair.prior)]
            logits = ratio.member_logits(torch.cat(both, 1))
            at_q, at_p = logits.tensor_split(2, dim=-1)
            losses.append(nce_loss(at_q, at_p, self.noise_ratio))
        return torch.stack(losses)


class _RatioJob:
    def __init__(
        self,
        ratios: list[RatioNetwork],
        vae: Any,
        table: EvidenceTable,
        heldout: list[Pairs],
        *,
        batch_size: int,
        patience: int,
        seed: int,
        noise_ratio: float = 1.0,
        of_vae: str = "",
    ) -> None:
        self.module = _Losses(ratios, noise_ratio)
        self.vae, self.table, self.heldout = vae, table, heldout
        self.rows_per_step = batch_size * ratios[0].members
        self.order = RowOrder(torch.arange(len(table)), self.rows_per_step, seed=seed)
        self.patience, self.of_vae = patience, of_vae
        self.best: dict[str, Any] = {"loss": math.inf, "step": 0, "weights": None}
        self.since_best = 0

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        self.table.advance(step)
        evidence = self.table[self.order(step).to(self.table.device)]
        losses = model(draw_pairs(self.vae, evidence, self.rows_per_step, generator))
        return losses.sum(), {"train_loss": losses.mean()}

    def evaluate(self, step: int) -> dict[str, float]:
        self.module.eval()
        loss = float(sum(nce_loss(*log_ratios(r, p)) for r, p in self._groups()))
        self.module.train()
        loss /= len(self.heldout)
        self.since_best += 1
        if loss < self.best["loss"]:
            weights = {k: v.clone() for k, v in self.module.state_dict().items()}
            self.best = {"loss": loss, "step": step, "weights": weights}
            self.since_best = 0
        return {"heldout_loss": loss}

    def should_stop(self) -> bool:
        return self.since_best >= self.patience

    def identity(self) -> dict[str, Any]:
        return {
            "VAE (fingerprint)": self.of_vae,
            "batch_size": self.rows_per_step,
            "training images": len(self.table),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "since_best": self.since_best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.since_best = state["best"], state["since_best"]

    def _groups(self) -> Any:
        return zip(self.module.ratios, self.heldout, strict=True)


def fit_prior(
    vae: Any,
    data: ImageDataset | Tensor,
    *,
    rows: Tensor | None = None,
    base: Density | str | None = None,
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
    log_z_draws: int = 200_000,
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
            components fitted on draws of q(z), or any density.
        preset: "small" (default below 20,000 images), "large" or "published"; the arguments that
            follow change it.
        network: "residual" or "mlp".
        network_options: Arguments of that network, such as width, blocks, dropout, members.
        steps: Optimiser steps at most.
        batch_size: Posterior and prior draws per step for each member.
        learning_rate: Peak rate of AdamW; it falls along half a cosine.
        weight_decay: Decoupled weight decay.
        noise_ratio: How many times p counts in the training loss (`nce_loss`); what is reported is
            always Eq. 3, where it counts once.
        clip_norm: Largest gradient norm; none by default.
        heldout: Share of `rows` held out; that of the preset by default.
        patience: Evaluations without improvement after which to stop.
        refresh_passes: Passes over the images in which the kept evidence of each is drawn anew,
            where the input is random.
        log_z_draws: Draws of the base prior from which log Z is estimated.
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
    if vae.num_groups > 1:
        raise ValueError(
            f"fit_prior takes VAEs with one group of latents so far, this one has {vae.num_groups}"
        )
    data = as_dataset(data)
    rows = torch.arange(len(data)) if rows is None else rows
    settings = fit_settings(
        preset or ("small" if len(rows) < SMALL_DATA else "large"),
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
    fabric = make_fabric(device, precision)
    device_ = fabric.device
    vae_fingerprint = fingerprint(vae)
    with evaluating(vae.to(device_)):
        held = encode(vae, data, rows_heldout, generator=stream(seed, "heldout"), device=device_)
        if isinstance(base, str):
            base = _named_base(base, vae, data, rows_fit, seed, device_)
        vae = vae if base is None else vae.with_prior(base)
        heldout_pairs, kls = _heldout_pairs(
            vae, held, stream(seed, "heldout draws", device=device_)
        )

        ratios = _new_ratios(settings, heldout_pairs, seed)
        rows_per_step = settings["batch_size"] * ratios[0].members
        table = EvidenceTable(
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
            heldout_pairs,
            batch_size=settings["batch_size"],
            patience=patience,
            seed=seed,
            noise_ratio=settings["noise_ratio"],
            of_vae=vae_fingerprint,
        )
        history = optimise(
            job,
            fabric,
            place=Place(directory, "ncp", resume, tensorboard),
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
        job.module.load_state_dict(job.best["weights"])
        job.module.eval().requires_grad_(False)

        seen = torch.arange(min(len(table), 5000), device=device_)
        seen_pairs = draw_pairs(vae, table[seen], len(seen), stream(seed, "seen", device=device_))
        prior = NoiseContrastivePrior(ratios, getattr(vae, "prior", None)).eval()
        prior.heldout_rows = rows_heldout
        prior.record = {
            "settings": settings,
            "seed": seed,
            "steps": int(history[-1]["step"]),
            "best_step": int(job.best["step"]),
            "fitted_images": len(rows_fit),
            "heldout_images": len(rows_heldout),
            "vae": vae_fingerprint,
            "groups": [
                calibrate_and_judge(*parts, heldout_images=len(rows_heldout), seed=seed)
                for parts in zip(ratios, heldout_pairs, seen_pairs, kls, strict=True)
            ],
        }
        if prior.base is not None:
            draws = prior.draw_log_ratio(
                log_z_draws, generator=stream(seed, "log z", device=device_)
            )
            prior.log_z = log_z(draws)
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
    if vae.num_groups != 1:
        raise ValueError('base="mixture" needs a VAE with one latent group')
    evidence = encode(vae, data, rows, generator=stream(seed, "base images"), device=device)
    pairs = draw_pairs(vae, evidence, len(rows), stream(seed, "base", device=device))
    return GaussianMixture.fit(pairs[0].posterior, 10, seed=seed)


@torch.no_grad()
def _heldout_pairs(
    vae: Any, evidence: Evidence, generator: Generator
) -> tuple[list[Pairs], list[float]]:
    """Many draws for each held-out image, and the mean KL of each group in nats."""
    kls: list[float] = []

    def choose(_: int, group: Group) -> Tensor:
        assert group.posterior is not None
        z = group.posterior.sample(generator=generator)
        kls.append(float(kl_divergence(group, z).mean()))
        return z

    images = len(evidence[0])
    walk(vae, choose, images, evidence)
    copies = max(1, min(50, HELDOUT_DRAWS // images))
    repeated = tuple(part.repeat(copies, *[1] * (part.ndim - 1)) for part in evidence)
    return draw_pairs(vae, repeated, copies * images, generator), kls


def _new_ratios(settings: dict[str, Any], pairs: list[Pairs], seed: int) -> list[RatioNetwork]:
    """A fresh network for each group, its weights a function of the seed alone."""
    make, ratios = NETWORKS[settings["network"]], []
    with torch.random.fork_rng([]):
        torch.manual_seed(stream_seed(seed, "ratio weights"))
        for pair in pairs:
            ratio = make(pair.posterior[0].numel(), **settings["network_options"])
            ratio.to(pair.posterior).standardize(torch.cat([pair.posterior, pair.prior]))
            ratios.append(ratio)
    return ratios
