"""Train a VAE further under its noise contrastive prior."""

import copy
from collections.abc import Sequence
from typing import Any

from torch import Generator, Tensor

from ncprior.data import ImageDataset, Splits
from ncprior.priors import NoiseContrastivePrior
from ncprior.storage import fingerprint
from ncprior.training.processes import make_fabric
from ncprior.training.vae import train_vae


class _Frozen:
    """An NCP as a density of batch shape () that is no part of the VAE: training leaves it alone.

    Without an estimate of log Z its `log_prob` is not normalised, which gradients do not see.
    """

    def __init__(self, prior: NoiseContrastivePrior) -> None:
        self.prior = prior
        self.log_z = 0.0 if prior.log_z is None else prior.log_z.value

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.prior.event_shape

    def log_prob(self, value: Tensor) -> Tensor:
        return self.prior.unnormalized_log_prob(value) - self.log_z

    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        raise TypeError("draw from an NCP with ncprior.draw")

    def tempered(self, temperature: float) -> "_Frozen":
        raise TypeError("draw from an NCP with ncprior.draw")


def finetune_vae(
    vae: Any,
    prior: NoiseContrastivePrior,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    steps: int = 1000,
    learning_rate: float = 3e-4,
    **options: Any,
) -> Any:
    """A copy of a flat VAE that was trained further with `prior` in place of its base prior.

    Its loss is minus the ELBO with log r(z) + log p(z) - log Z as the prior's log-density, and the
    ratio is frozen. Encoder and decoder have moved then, so that the prior is to be fitted anew:

        tuned = finetune_vae(vae, prior, data, splits)
        prior = fit_prior(tuned, data, rows=splits.train)

    Args:
        vae: A VAE with one latent group; it is not changed.
        prior: The prior that was fitted on it; it is not changed.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        splits: As in `train_vae`.
        steps: Optimiser steps.
        learning_rate: Peak rate; it falls along half a cosine.
        options: Other arguments of `train_vae`; its warm-up of the KL is off unless asked for.

    Returns:
        The copy, in evaluation mode, on the base prior of `prior`.

    Raises:
        ValueError: several latent groups, whose log Z would move with the decoder, or a prior that
            was fitted on another VAE.
    """
    if vae.num_groups > 1:
        raise ValueError(f"finetune_vae needs one latent group, got {vae.num_groups}")
    if prior.record.get("vae", fingerprint(vae)) != fingerprint(vae):
        raise ValueError("prior was fitted on another VAE; fit one on this VAE first")
    place = {name: options[name] for name in ("device", "precision") if name in options}
    frozen = copy.deepcopy(prior).eval().requires_grad_(False).to(make_fabric(**place).device)
    tuned = copy.deepcopy(prior.under(vae))
    if frozen.base is None:
        frozen.base = copy.deepcopy(tuned.prior)
    trained = tuned.with_prior(_Frozen(frozen))
    train_vae(
        trained,
        data,
        splits,
        steps=steps,
        learning_rate=learning_rate,
        **({"kl_warmup": 0.0} | options),
    )
    return trained.with_prior(tuned.prior).eval()
