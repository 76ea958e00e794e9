"""Stage 1: train the VAE by its ELBO under the base prior, or an autoencoder by another loss."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.normal import Normal
from ncprior.numerics import stream
from ncprior.training.balancing import balance, scale_weights
from ncprior.training.loop import Place, optimise
from ncprior.training.objectives import Autoencoding, check_objective
from ncprior.training.order import RowOrder
from ncprior.training.processes import make_fabric, mean_over_processes
from ncprior.training.regularisation import FIRST_ITERATIONS, LATER_ITERATIONS, NormPenalty
from ncprior.training.spectral import spectral_normalised
from ncprior.training.synced import synchronised_batch_norms
from ncprior.walk import Group, walk

SMALLEST_BETA = 1e-4


class Elbo(nn.Module):
    """Minus the ELBO of a batch, by one walk along the posterior (Eq. 1 and 2 of the paper).

    Whatever precision the networks run in, densities and divergences are computed in float32.

    Args:
        vae: Any VAE that offers the walk.
        balanced: Balance the groups' KL while its weight is below 1 (`balancing.balance`).
        norms: Adds its penalty to the loss.
        mean: The mean over processes of what each of them found.
        kl_weight: Factor on the KL in the loss; the figures are those of the ELBO whatever it is.
    """

    followed = "elbo"

    def __init__(
        self,
        vae: Any,
        *,
        balanced: bool = False,
        norms: NormPenalty | None = None,
        mean: Callable[[Tensor], Tensor] = Tensor.detach,
        kl_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.vae, self.norms = vae, norms
        self.balanced, self.mean, self.kl_weight = balanced, mean, kl_weight

    def forward(
        self,
        images: Tensor,
        generator: Generator | None = None,
        beta: float = 1.0,
        norm_weight: float = 0.0,
        iterations: int = LATER_ITERATIONS,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss -E[log p(x|z)] + kl_weight beta KL in nats per image, and its parts.

        Args:
            images: (n, c, h, w) in [0, 1].
            generator: Source of the posterior's draws.
            beta: How much of the KL's weight it has by now.
            norm_weight: Weight of the penalty on norms.
            iterations: Power iterations for that.
        """
        kls: list[Tensor] = []  # of each group, (n,)
        shapes: list[tuple[int, ...]] = []

        def choose(_: int, group: Group) -> Tensor:
            group = group._replace(prior=_full(group.prior), posterior=_full(group.posterior))
            assert group.posterior is not None
            if _closed_form(group):
                z, log_q = group.posterior.rsample(generator=generator), None
            else:
                z, log_q = group.posterior.rsample_and_log_prob(generator=generator)
            with torch.autocast(images.device.type, enabled=False):
                kls.append(kl_divergence(group, z, log_q))
            shapes.append(tuple(z.shape[1:]))
            return z

        walked = walk(self.vae, choose, len(images), self.vae.encode(images))
        emission = _full(self.vae.emit(walked.state))
        with torch.autocast(images.device.type, enabled=False):
            log_likelihood = emission.log_prob(images).mean()
            kl = torch.stack(kls).sum(0).mean()
            weighed = kl
            if self.balanced and beta < 1:
                each = torch.stack([kl.mean() for kl in kls])  # (K,)
                size = self.mean(torch.stack([kl.detach().abs().mean() for kl in kls]))
                weighed = (balance(size, scale_weights(shapes)) * each).sum()
            loss = self.kl_weight * beta * weighed - log_likelihood
            figures = {"elbo": log_likelihood - kl, "kl": kl}
            if self.norms is not None and norm_weight:
                figures["norm_penalty"] = norm_weight * self.norms(self.vae, iterations)
                loss = loss + figures["norm_penalty"]
        return loss, figures


def kl_divergence(group: Group, z: Tensor, log_q: Tensor | None = None) -> Tensor:
    """KL(q || p) of a group in nats, (n,): in closed form where both are normal, else at z.

    Args:
        group: A group with its posterior.
        z: A draw of the posterior, (n, *event).
        log_q: Its log-density there, (n,), as `rsample_and_log_prob` gives it; needed only where
            there is no closed form.
    """
    if _closed_form(group):
        return group.posterior.kl(group.prior)  # type: ignore[union-attr, arg-type]
    assert group.posterior is not None
    log_q = group.posterior.log_prob(z) if log_q is None else log_q
    return log_q - group.prior.log_prob(z)


def _closed_form(group: Group) -> bool:
    return isinstance(group.posterior, Normal) and isinstance(group.prior, Normal)


def _full(density: Any) -> Any:
    """A density whose tensors of half precision are float32 instead."""
    if isinstance(density, Tensor):
        halved = density.dtype in (torch.float16, torch.bfloat16)
        return density.float() if halved else density
    if not dataclasses.is_dataclass(density) or isinstance(density, type):
        return density
    parts = {f.name: getattr(density, f.name) for f in dataclasses.fields(density) if f.init}
    full = {name: _full(part) for name, part in parts.items()}
    changed = any(full[name] is not part for name, part in parts.items())
    return dataclasses.replace(density, **full) if changed else density


def kl_ramp(step: int, *, start: float, length: float) -> float:
    """beta of a step (counted from 0): 0 or next to it up to step `start`, then rising to 1.

    Reference: the published program of NVAE, whose steps begin at 0 where ours end at 1.
    """
    if not length:
        return 1.0 if step + 1 > start else SMALLEST_BETA
    beta = min(1.0, (step + 1 - start) / length)
    return max(SMALLEST_BETA, beta) if start else beta


def norm_weight(beta: float, initial: float, final: float) -> float:
    """lambda at this weight of the KL: from `initial` to `final`, its logarithm linear in beta."""
    return math.exp((1 - beta) * math.log(initial) + beta * math.log(final))


class _VAEJob:
    def __init__(
        self,
        vae: Any,
        data: Any,
        rows: Tensor,
        validation: Tensor,
        *,
        batch_size: int,
        warmup_steps: float,
        start_steps: float = 0.0,
        balanced: bool = False,
        norm_penalty: float = 0.0,
        norm_penalty_initial: float | None = None,
        kl_weight: float = 1.0,
        objective: Autoencoding | None = None,
        seed: int,
        device: torch.device,
        fabric: Any = None,
    ) -> None:
        norms = None
        if norm_penalty:
            norms = NormPenalty(vae, generator=stream(seed, "power iteration"))
        self.fabric = fabric
        self.module = objective or Elbo(
            vae, balanced=balanced, norms=norms, mean=self._mean, kl_weight=kl_weight
        )
        self.data, self.validation, self.device, self.seed = data, validation, device, seed
        self.order = RowOrder(rows, batch_size, seed=seed)
        self.warmup_steps, self.start_steps = warmup_steps, start_steps
        self.norm_penalty, self.norm_penalty_initial = norm_penalty, norm_penalty_initial
        self.rank: int = fabric.global_rank if fabric else 0
        self.world: int = fabric.world_size if fabric else 1
        self.validation_generator = Generator(device)

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        index = step * self.world + self.rank
        draws = stream(self.seed, "images", index) if self.data.redrawn else None
        rows = self.order(step).chunk(self.world)[self.rank]
        images = self.data.batch(rows, generator=draws).to(self.device)
        beta = kl_ramp(step, start=self.start_steps, length=self.warmup_steps)
        if not self.norm_penalty:
            return model(images, generator, beta)
        initial = self.norm_penalty_initial or self.norm_penalty
        iterations = LATER_ITERATIONS if step else FIRST_ITERATIONS
        weight = norm_weight(beta, initial, self.norm_penalty)
        return model(images, generator, beta, weight, iterations)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        """ELBO or error of validation images, shared out between processes."""
        self.module.eval()
        draws = stream(self.seed, "validation images", self.rank)
        generator = self.validation_generator.manual_seed(self.rank)
        total, rows, followed = 0.0, self.validation[:2000], self.module.followed
        for part in rows[self.rank :: self.world].split(500):
            if len(part):
                images = self.data.batch(part, generator=draws).to(self.device)
                total += float(self.module(images, generator)[1][followed]) * len(part)
        self.module.train()
        if self.world > 1:
            total = self.world * float(self._mean(torch.tensor(total, dtype=torch.float64)))
        return {f"validation_{followed}": total / len(rows)}

    def should_stop(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        known = {"batch_size": self.order.batch_size, "training images": len(self.order.rows)}
        if isinstance(self.module, Autoencoding):
            return known | {"objective": self.module.objective}
        return known

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _mean(self, values: Tensor) -> Tensor:
        return mean_over_processes(self.fabric, values) if self.fabric else values.detach()


def train_vae(
    vae: Any,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    steps: int = 4000,
    batch_size: int = 128,
    optimizer: str = "adamw",
    learning_rate: float = 1e-3,
    learning_rate_end: float = 0.0,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    warmup: int = 0,
    objective: str = "elbo",
    latent_weight: float | None = None,
    decoder_weight: float | None = None,
    kl_weight: float = 1.0,
    kl_warmup: float = 0.2,
    kl_start: float = 0.0,
    kl_balance: bool = False,
    norm_penalty: float = 0.0,
    norm_penalty_initial: float | None = None,
    clip_norm: float | None = None,
    retries: int = 3,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    precision: str = "32-true",
    evaluate_every: int = 250,
    checkpoint_every: int = 1000,
    directory: Path | None = None,
    begin: Callable[[], None] | None = None,
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train `vae` in place; return the training history, a row per evaluation.

    Where the loss or a weight is not finite, the run goes back to its last checkpoint (its start if
    there is none yet) and goes on with half the learning rate, `retries` times at most. It says so
    on standard error, and from then on the history has a column `recoveries`.

    On several devices, or where `torchrun` started several processes, each takes its share of every
    batch, batch norms look at the whole of it, and the first process alone writes.

    Args:
        vae: Any VAE that offers the walk.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        splits: Its parts for training and for validation, on which the ELBO is followed and which
            decides nothing; 80/10/10 at random by default.
        steps: Optimiser steps.
        batch_size: Images per step, over all devices.
        optimizer: "adamw" or "adamax".
        learning_rate: Peak rate; it falls along half a cosine.
        learning_rate_end: Where it falls to.
        eps: The optimiser's; NVAE's Adamax has 1e-3.
        weight_decay: Decoupled with "adamw"; added to the gradient (L2) with "adamax".
        warmup: Steps over which the learning rate rises.
        objective: "elbo", or for an autoencoder (`posterior_scale="deterministic"`) "wae-mmd",
            "rae-l2", "rae-gp" or "rae-sn": the mean squared error of reconstructions and what
            `Autoencoding` of `ncprior.training.objectives` adds. Its error takes the place of the
            ELBO on validation images. There is no likelihood afterwards, so no NLL either, and
            draws of N(0, I) are far from the codes unless it is "wae-mmd": fit a density to them,
            as with `fit_prior(..., base="mixture")`.
        latent_weight: Weight of the penalty on codes; that in `OBJECTIVES` there by default.
        decoder_weight: Weight of the penalty on the decoder, of "rae-l2" and "rae-gp" alone.
        kl_weight: Weight of the KL in the loss. Below 1 posteriors become narrow and the hole in
            the prior large; the ELBO that is reported is that of weight 1.
        kl_warmup: Share of the steps over which a factor beta on that weight, or on
            `latent_weight`, rises to 1.
        kl_start: Share of the steps before that, in which it is 1e-4.
        kl_balance: While beta is below 1, weigh the groups of latents as NVAE does, so that none is
            left unused.
        norm_penalty: NVAE's lambda: weight of the sum of the spectral norms of all convolutions and
            of the largest factors of all batch norms.
        norm_penalty_initial: Its value at beta = 0, from which its logarithm moves linearly in
            beta; the same by default.
        clip_norm: Largest gradient norm; none by default.
        retries: Recoveries from numbers that are not finite.
        seed: Seed of all randomness in training (not of the weights `vae` comes with).
        device: "auto", "cpu", "cuda" or "mps".
        devices: Devices on this machine. Above 1 the running script is started once more for each
            of the others, unless `torchrun` started the processes; then their number counts.
        precision: Lightning Fabric's, such as "32-true", "bf16-mixed" or "16-mixed". Densities are
            computed in float32 in any case.
        evaluate_every: Steps between evaluations.
        checkpoint_every: Steps between checkpoints.
        directory: Where checkpoints and logs go; nowhere by default.
        begin: Called once all settings are found to work, before anything is written there.
        resume: Go on from the checkpoint in `directory`, if there is one.
        tensorboard: Also write TensorBoard logs.
        progress: Show a progress bar.

    Raises:
        ValueError: settings that cannot work, before any step.
        Diverged: the loss became NaN once more after `retries` recoveries.

    Reference: for `kl_start`, `kl_balance` and `norm_penalty` Vahdat and Kautz, "NVAE: A Deep
    Hierarchical Variational Autoencoder" (NeurIPS 2020), and the published program.
    """
    data, splits = as_data(data, splits, seed)
    rows = splits.train
    if batch_size < 1 or batch_size > len(rows):
        raise ValueError(
            f"batch_size must be between 1 and the {len(rows)} training images, got {batch_size}"
        )
    if not 0 <= kl_weight < math.inf:
        raise ValueError(f"kl_weight must be finite and at least 0, got {kl_weight}")
    if not 0 <= kl_warmup <= 1:
        raise ValueError(f"kl_warmup is a share of the steps, between 0 and 1, got {kl_warmup}")
    if not 0 <= kl_start <= 1:
        raise ValueError(f"kl_start is a share of the steps, between 0 and 1, got {kl_start}")
    if not norm_penalty >= 0:
        raise ValueError(f"norm_penalty must be at least 0, got {norm_penalty}")
    if norm_penalty_initial is not None and not (norm_penalty_initial > 0 and norm_penalty > 0):
        raise ValueError(
            "norm_penalty_initial and norm_penalty must both be positive, got "
            f"{norm_penalty_initial} and {norm_penalty}"
        )
    check_objective(objective, vae, latent_weight, decoder_weight)
    if objective != "elbo" and (kl_weight != 1 or kl_balance or norm_penalty):
        raise ValueError(
            "kl_weight, kl_balance and norm_penalty are of objective elbo; leave them out for "
            f"{objective}, got {kl_weight}, {kl_balance} and {norm_penalty}"
        )
    fabric = make_fabric(device, precision, devices)
    if batch_size % fabric.world_size:
        raise ValueError(
            f"batch_size must be divisible by the {fabric.world_size} processes, got {batch_size}"
        )
    vae.train()
    autoencoding = None
    if objective != "elbo":
        weights = {"latent_weight": latent_weight, "decoder_weight": decoder_weight}
        autoencoding = Autoencoding(vae, objective, **weights)
    normalised = objective == "rae-sn"
    with (
        spectral_normalised(vae.decoder if normalised else vae, wanted=normalised, seed=seed),
        synchronised_batch_norms(vae, wanted=fabric.world_size > 1),
    ):
        job = _VAEJob(
            vae,
            data,
            rows,
            splits.validation,
            batch_size=batch_size,
            warmup_steps=kl_warmup * steps,
            start_steps=kl_start * steps,
            balanced=kl_balance,
            norm_penalty=norm_penalty,
            norm_penalty_initial=norm_penalty_initial,
            kl_weight=kl_weight,
            objective=autoencoding,
            seed=seed,
            device=fabric.device,
            fabric=fabric,
        )
        history = optimise(
            job,
            fabric,
            place=Place(directory, "vae", resume, tensorboard),
            steps=steps,
            learning_rate=learning_rate,
            learning_rate_end=learning_rate_end,
            optimizer=optimizer,
            eps=eps,
            weight_decay=weight_decay,
            warmup=warmup,
            clip_norm=clip_norm,
            retries=retries,
            seed=seed,
            evaluate_every=evaluate_every,
            checkpoint_every=checkpoint_every,
            begin=begin,
            description="training the VAE",
            progress=progress,
        )
    vae.eval()
    return history
