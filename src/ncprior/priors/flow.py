"""Normalising flows over latents, whose transformations come from zuko."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.distributions import Distribution

from ncprior.normal import LOG_2_PI
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, first_weights, ignore, maximise_likelihood
from ncprior.priors.latent import LatentPrior

FAMILIES = ("realnvp", "nsf", "maf")


class FlowPrior(LatentPrior):
    """The density of T^-1(x), x ~ N(0, I), with a learnt invertible T.

    Args:
        latent_size: d.
        family: "realnvp" (affine couplings: quick both ways), "nsf" (rational-quadratic splines in
            couplings: each step takes four times as long; 3 transforms are usual) or "maf" (masked
            autoregressive: quick density, d passes for a draw).
        transforms: Transformations, one after the other.
        hidden: Widths of the layers in each of them.
        bins: Bins of a spline.

    Splines change nothing beyond 5 standard deviations of the codes.

    Raises:
        ModuleNotFoundError: zuko is not installed.

    References: Dinh et al. (2017, RealNVP), Papamakarios et al. (2017, MAF), Durkan et al. (2019,
    neural spline flows).
    """

    normalized = True

    def __init__(
        self,
        latent_size: int,
        *,
        family: str = "realnvp",
        transforms: int = 6,
        hidden: Sequence[int] = (128, 128),
        bins: int = 8,
    ) -> None:
        super().__init__(latent_size)
        if family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
        self.config: dict[str, Any] = {
            "latent_size": latent_size,
            "family": family,
            "transforms": transforms,
            "hidden": list(hidden),
            "bins": bins,
        }
        zuko = _import_zuko()
        options: dict[str, Any] = {"transforms": transforms, "hidden_features": list(hidden)}
        if family == "maf":
            self.flow = zuko.flows.MAF(latent_size, **options)
        else:
            if family == "nsf":
                options["univariate"] = partial(zuko.transforms.MonotonicRQSTransform, slope=1e-3)
                options["shapes"] = [(bins,), (bins,), (bins - 1,)]
            self.flow = zuko.flows.NICE(latent_size, randmask=latent_size > 1, **options)
        self.temperature = 1.0

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...)."""
        x, log_det = self.flow.transform().call_and_ladj(self.inner(value))
        normal = -0.5 * ((x / self.temperature).square() + LOG_2_PI).sum(-1)
        return normal - self.latent_size * math.log(self.temperature) + log_det + self.log_det()

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        shape = (*sample_shape, self.latent_size)
        options: Any = {"device": self.loc.device, "dtype": self.loc.dtype}
        noise = torch.randn(shape, generator=generator, **options)
        return self.outer(self.flow.transform().inv(self.temperature * noise))

    def tempered(self, temperature: float) -> "FlowPrior":
        """The same transformation of N(0, temperature^2 I)."""
        if temperature == 1:
            return self
        other = copy.copy(self)
        other.temperature = self.temperature * temperature
        return other

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        family: str = "realnvp",
        transforms: int = 6,
        hidden: Sequence[int] = (128, 128),
        bins: int = 8,
        steps: int = 1500,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.0,
        heldout: float = 0.1,
        seed: int = 0,
        report: Report = ignore,
    ) -> "FlowPrior":
        """Fit by maximum likelihood; the arguments are those of the class and of `descend`."""
        size = codes.checked().latent_size
        with first_weights(seed):
            prior = cls(size, family=family, transforms=transforms, hidden=hidden, bins=bins)
        return maximise_likelihood(
            prior,
            codes,
            batch_size=batch_size,
            heldout=heldout,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clip_norm=5.0,
            seed=seed,
            report=report,
        )


def _import_zuko() -> Any:
    """`zuko`; the torch default that its import changes is put back."""
    validates = Distribution._validate_args
    try:
        import zuko
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'flows need zuko; install it with: pip install "ncprior[flows]"'
        ) from None
    finally:
        Distribution.set_default_validate_args(validates)
    return zuko
