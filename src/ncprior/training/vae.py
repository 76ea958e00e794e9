"""Stage 1: train the VAE by its ELBO under the base prior."""

from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.normal import Normal
from ncprior.numerics import stream
from ncprior.training.loop import Place, make_fabric, optimise
from ncprior.training.order import RowOrder
from ncprior.walk import Group, walk


class Elbo(nn.Module):
    """Minus the ELBO of a batch, by one walk along the posterior (Eq. 1 and 2 of the paper)."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, images: Tensor, generator: Generator | None = None, beta: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss -E[log p(x|z)] + beta KL in nats per image, and its parts."""
        kls: list[Tensor] = []

        def choose(_: int, group: Group) -> Tensor:
            assert group.posterior is not None
            z = group.posterior.rsample(generator=generator)
            kls.append(kl_divergence(group, z))
            return z

        walked = walk(self.vae, choose, len(images), self.vae.encode(images))
        log_likelihood = self.vae.emit(walked.state).log_prob(images).mean()
        kl = torch.stack(kls).sum(0).mean()
        return beta * kl - log_likelihood, {"elbo": log_likelihood - kl, "kl": kl}


def kl_divergence(group: Group, z: Tensor) -> Tensor:
    """KL(q || p) of a group in nats, (n,): in closed form, else log q - log p at z."""
    assert group.posterior is not None
    if isinstance(group.prior, Normal):
        return group.posterior.kl(group.prior)
    return group.posterior.log_prob(z) - group.prior.log_prob(z)


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
        seed: int,
        device: torch.device,
    ) -> None:
        self.module = Elbo(vae)
        self.data, self.validation, self.device, self.seed = data, validation, device, seed
        self.order = RowOrder(rows, batch_size, seed=seed)
        self.warmup_steps = warmup_steps
        self.validation_generator = Generator(device)

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        draws = stream(self.seed, "images", step) if self.data.redrawn else None
        images = self.data.batch(self.order(step), generator=draws).to(self.device)
        beta = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return model(images, generator, beta)

    @torch.no_grad()
    def evaluate(self, step: int) -> dict[str, float]:
        self.module.eval()
        draws = stream(self.seed, "validation images")
        generator = self.validation_generator.manual_seed(0)
        total, rows = 0.0, self.validation[:2000]
        for part in rows.split(500):
            images = self.data.batch(part, generator=draws).to(self.device)
            total += float(self.module(images, generator)[1]["elbo"]) * len(part)
        self.module.train()
        return {"validation_elbo": total / len(rows)}

    def should_stop(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        return {"batch_size": self.order.batch_size, "training images": len(self.order.rows)}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def train_vae(
    vae: Any,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    steps: int = 4000,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    warmup: int = 0,
    kl_warmup: float = 0.2,
    clip_norm: float | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    evaluate_every: int = 250,
    checkpoint_every: int = 1000,
    directory: Path | None = None,
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Train `vae` in place; return the training history, a row per evaluation.

    Args:
        vae: Any VAE that offers the walk.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        splits: Its parts for training and for validation, on which the ELBO is followed and which
            decides nothing; 80/10/10 at random by default.
        steps: Optimiser steps.
        batch_size: Images per step.
        learning_rate: Peak rate of Adam; it falls along half a cosine.
        weight_decay: Decoupled weight decay.
        warmup: Steps over which the learning rate rises.
        kl_warmup: Share of the steps over which the weight of the KL rises to 1.
        clip_norm: Largest gradient norm; none by default.
        seed: Seed of all randomness in training (not of the weights `vae` comes with).
        device: "auto", "cpu", "cuda" or "mps".
        precision: Lightning Fabric's, such as "32-true" or "bf16-mixed".
        evaluate_every: Steps between evaluations.
        checkpoint_every: Steps between checkpoints.
        directory: Where checkpoints and logs go; nowhere by default.
        resume: Go on from the checkpoint in `directory`, if there is one.
        tensorboard: Also write TensorBoard logs.
        progress: Show a progress bar.

    Raises:
        ValueError: settings that cannot work, before any step.
        Diverged: the loss became NaN.
    """
    data, splits = as_data(data, splits, seed)
    rows = splits.train
    if batch_size < 1 or batch_size > len(rows):
        raise ValueError(
            f"batch_size must be between 1 and the {len(rows)} training images, got {batch_size}"
        )
    if not 0 <= kl_warmup <= 1:
        raise ValueError(f"kl_warmup is a share of the steps, between 0 and 1, got {kl_warmup}")
    fabric = make_fabric(device, precision)
    vae.train()
    job = _VAEJob(
        vae,
        data,
        rows,
        splits.validation,
        batch_size=batch_size,
        warmup_steps=kl_warmup * steps,
        seed=seed,
        device=fabric.device,
    )
    history = optimise(
        job,
        fabric,
        place=Place(directory, "vae", resume, tensorboard),
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        clip_norm=clip_norm,
        seed=seed,
        evaluate_every=evaluate_every,
        checkpoint_every=checkpoint_every,
        description="training the VAE",
        progress=progress,
    )
    vae.eval()
    return history
