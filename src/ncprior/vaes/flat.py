"""A VAE with one group of latents, from any encoder, decoder and likelihood."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.normal import Normal, StandardNormal
from ncprior.walk import Density, Evidence, Group, Repeated

POSTERIOR_SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "log_variance": lambda raw: (0.5 * raw).exp(),
    "log_scale": torch.exp,
    "softplus": lambda raw: F.softplus(raw).clamp_min(1e-5),
    "tanh": lambda raw: (5 * raw.tanh()).exp(),
}
DETERMINISTIC = "deterministic"


class FlatState(NamedTuple):
    """Rows of the walk, and z (n, d) once it is chosen."""

    num: int
    z: Tensor | None = None


class FlatVAE(nn.Module):
    """A VAE with one group of d latents. Wrapping your own networks takes one call:

        vae = FlatVAE(encoder, decoder, Gaussian(scale=0.1), latent_size=16)

    Args:
        encoder: Images (n, c, h, w) in [0, 1] to (n, 2 d), or to a pair of (n, d): the posterior's
            mean and a raw scale. Of an autoencoder to (n, d), its codes.
        decoder: z (n, d) to what the likelihood takes, usually (n, c, h, w).
        likelihood: `Bernoulli()`, `Gaussian(...)`, `Categorical(...)` or any module that returns an
            object with `mean`, `log_prob(images)` and `sample(generator=)`.
        latent_size: d.
        posterior_scale: What the raw scale is: "log_variance", "log_scale", "softplus" or "tanh"
            (log scale = 5 tanh(raw)). Or "deterministic", for an autoencoder (`train_vae` with an
            objective other than the ELBO): there is no raw scale then, and the posterior is normal
            around the code with the fixed deviation `code_scale`. That is small enough to change
            no image and lets priors, ratios and reconstructions work as ever; a likelihood would
            depend on it arbitrarily, so that none is computed.
        code_scale: That deviation, in units of the latents. It should be far below the spread of
            the codes.
        prior: Any density of batch shape () and event shape (d,); N(0, I) by default. The VAE does
            not own it: `with_prior` puts another one under the same networks.
    """

    num_groups = 1

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        likelihood: nn.Module,
        latent_size: int,
        *,
        posterior_scale: str = "log_variance",
        code_scale: float = 1e-3,
        prior: Density | None = None,
    ) -> None:
        super().__init__()
        if posterior_scale not in (known := (DETERMINISTIC, *POSTERIOR_SCALES)):
            raise ValueError(
                f"posterior_scale must be one of {', '.join(known)}, got {posterior_scale!r}"
            )
        if not callable(likelihood) or isinstance(likelihood, type):
            raise ValueError(
                f"likelihood must be an instance such as Bernoulli() or Gaussian(scale=0.1), got "
                f"{likelihood!r}"
            )
        if not 0 < code_scale < math.inf:
            raise ValueError(f"code_scale must be positive and finite, got {code_scale}")
        self.encoder, self.decoder, self.likelihood = encoder, decoder, likelihood
        self.latent_size = latent_size
        self.posterior_scale, self.code_scale = posterior_scale, code_scale
        self.prior: Any = prior if prior is not None else StandardNormal(latent_size)
        self.config: dict[str, Any] | None = None  # how `build_vae` made it, for saving

    @property
    def deterministic(self) -> bool:
        """Whether the encoder gives a code alone, so that there is no likelihood."""
        return self.posterior_scale == DETERMINISTIC

    def with_prior(self, prior: Density) -> Self:
        """The same networks (shared, not copied) on another base prior."""
        if tuple(prior.event_shape) != (self.latent_size,):
            raise ValueError(
                f"prior must have event shape ({self.latent_size},), got {tuple(prior.event_shape)}"
            )
        other = copy.copy(self)
        other._modules = dict(self._modules)
        other.__dict__.pop("prior", None)
        other._modules.pop("prior", None)
        other.prior = prior
        return other

    def encode(self, images: Tensor) -> Evidence:
        """Posterior mean and scale, each (n, d)."""
        outputs = self.encoder(images)
        if self.deterministic:
            return self._code(outputs, len(images))
        pair = outputs.chunk(2, dim=-1) if isinstance(outputs, Tensor) else tuple(outputs)
        if len(pair) != 2:
            raise ValueError(
                f"encoder must return mean and raw scale, a pair of (n, {self.latent_size}) or one "
                f"tensor of twice that width, got {len(pair)} parts"
            )
        loc, raw = pair
        if loc.shape != (len(images), self.latent_size):
            raise ValueError(
                f"encoder must return two halves of shape ({len(images)}, {self.latent_size}), "
                f"got {tuple(loc.shape)}; check latent_size"
            )
        return loc, POSTERIOR_SCALES[self.posterior_scale](raw)

    def _code(self, code: Tensor, num: int) -> Evidence:
        if not isinstance(code, Tensor) or code.shape != (num, self.latent_size):
            found = tuple(code.shape) if isinstance(code, Tensor) else type(code).__name__
            raise ValueError(
                f"a deterministic encoder must return codes of shape ({num}, {self.latent_size}), "
                f"got {found}; check latent_size"
            )
        return code, torch.full_like(code, self.code_scale)

    def start(self, num: int) -> FlatState:
        return FlatState(num)

    def group(self, state: FlatState, evidence: Evidence | None = None) -> Group:
        prior = self.prior
        rows = prior.rows(state.num) if hasattr(prior, "rows") else Repeated(prior, state.num)
        return Group(
            rows, None if evidence is None else Normal(evidence[0], evidence[1]), context=None
        )

    def advance(self, state: FlatState, z: Tensor) -> FlatState:
        return FlatState(state.num, z)

    def emit(self, state: FlatState) -> Any:
        """The likelihood p(x | z) of the n rows."""
        if state.z is None:
            raise ValueError("emit needs a state in which z is chosen; advance it first")
        return self.likelihood(self.decoder(state.z))
