"""Two-stage VAE: a second, small VAE on the codes of the first."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ncprior.normal import LOG_2_PI, Normal
from ncprior.numerics import log_mean_exp, stream
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, descend, first_weights, ignore
from ncprior.priors.latent import LatentPrior
from ncprior.walk import Repeated

FIRST_LOG_NOISE = -1.0
"""log gamma, and log scale of q(u | z), at the start. From gamma = 1, that of all the codes'
variation, the second VAE ignores u and stays at a normal density."""


class TwoStagePrior(LatentPrior):
    """z = f(u) + gamma noise with u ~ N(0, I): a decoder on latents, in standardised coordinates.

    Its density is an integral over u: only a bound on it can be had, hence neither `log_prob` nor
    `unnormalized_log_prob`. Samples are all that an NCP needs to be fitted and drawn from on it.

    Args:
        latent_size: d; u has as many coordinates, as published.
        hidden: Widths of the layers of encoder and decoder.

    Reference: Dai and Wipf (ICLR 2019). Published: 3 layers of 1024 with ReLU, the input beside the
    last layer's, a learnt scalar gamma from 1. Ours has SiLU, two narrower layers, and a gamma that
    starts lower.
    """

    normalized = False

    def __init__(self, latent_size: int, *, hidden: Sequence[int] = (512, 512)) -> None:
        super().__init__(latent_size)
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must hold widths of at least 1, got {hidden}")
        self.hidden = tuple(hidden)
        self.encoder = _Network(latent_size, self.hidden, 2 * latent_size)
        self.decoder = _Network(latent_size, self.hidden, latent_size)
        self.log_noise = nn.Parameter(torch.tensor(FIRST_LOG_NOISE))  # of standardised codes
        nn.init.constant_(self.encoder.out.bias[latent_size:], FIRST_LOG_NOISE)

    @property
    def config(self) -> dict[str, Any]:
        return {"latent_size": self.latent_size, "hidden": list(self.hidden)}

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d), the decoder's noise included."""
        shape = (2, math.prod(sample_shape), self.latent_size)
        noise = torch.randn(
            shape, generator=generator, device=self.loc.device, dtype=self.loc.dtype
        )
        x = torch.addcmul(self.decoder(noise[0]), noise[1], self.log_noise.exp())
        return self.outer(x).view(*sample_shape, self.latent_size)

    def log_prob_bound(
        self, value: Tensor, *, num: int = 64, generator: Generator | None = None
    ) -> Tensor:
        """A lower bound in expectation on log p(z) in nats of z (..., d), shape (...).

        By `num` draws of u from the second encoder; it rises to log p(z) as `num` grows (Burda et
        al. 2016).
        """
        flat = value.reshape(-1, self.latent_size)
        bounds = [
            log_mean_exp(self._log_weights(self.inner(part), num, generator), 0)
            for part in flat.split(max(1, 65536 // num))
        ]
        return (torch.cat(bounds) + self.log_det()).view(value.shape[:-1])

    def rows(self, num: int) -> "BoundedRows":
        """The density for each of `num` rows of a walk, by its bound."""
        return BoundedRows(self, num)

    def elbo(self, value: Tensor, *, generator: Generator | None = None) -> Tensor:
        """The evidence lower bound in nats of z (n, d) by one draw of u each, (n,)."""
        return self._log_weights(self.inner(value), 1, generator)[0] + self.log_det()

    def _log_weights(self, x: Tensor, num: int, generator: Generator | None) -> Tensor:
        """log p(x, u) - log q(u | x) in nats at draws of u, (num, n)."""
        loc, log_scale = self.encoder(x).chunk(2, -1)
        u, log_q = Normal(loc, log_scale.exp()).rsample_and_log_prob((num,), generator=generator)
        prior = -0.5 * (u.square() + LOG_2_PI).sum(-1)
        standard = (x - self.decoder(u)) * (-self.log_noise).exp()
        constant = self.latent_size * (self.log_noise + 0.5 * LOG_2_PI)
        return prior - 0.5 * standard.square().sum(-1) - constant - log_q

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        hidden: Sequence[int] = (512, 512),
        steps: int = 2000,
        batch_size: int = 256,
        learning_rate: float = 3e-3,
        weight_decay: float = 0.0,
        heldout: float = 0.1,
        seed: int = 0,
        report: Report = ignore,
    ) -> "TwoStagePrior":
        """Fit by the ELBO; the arguments are those of the class and of `descend`."""
        rest, held = codes.checked().split(heldout, seed=seed)
        with first_weights(seed):
            prior = cls(codes.latent_size, hidden=hidden)
        prior.to(codes.loc).standardize(rest)
        device = codes.loc.device
        draws = held.each(generator=stream(seed, "held-out draws", device=device))

        def heldout_loss() -> float:
            same = stream(seed, "held-out noise", device=device)
            parts = [prior.elbo(part, generator=same).sum() for part in draws.split(4096)]
            return -float(torch.stack(parts).sum()) / len(draws)

        def loss(generator: Generator) -> Tensor:
            z = rest.draw(batch_size, generator=generator)
            return -prior.elbo(z, generator=generator).mean()

        descend(
            prior,
            loss,
            heldout_loss,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clip_norm=100.0,
            evaluate_every=50,
            seed=seed,
            report=report,
        )
        return prior.requires_grad_(False)


class BoundedRows(Repeated):
    """A two-stage prior for each row; its `log_prob` is the bound of 64 draws, the same each time.

    Drawing and fitting never ask for it; what does, such as a KL that is reported, has a bound too.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        fixed = stream(0, "two-stage bound", device=value.device)
        return self.density.log_prob_bound(value, generator=fixed)


class _Network(nn.Module):
    """Layers with SiLU; the last one sees the input too, as published."""

    def __init__(self, size: int, hidden: Sequence[int], out: int) -> None:
        super().__init__()
        widths = [size, *hidden]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1] + size, out)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.layers:
            h = nn.functional.silu(layer(h))
        return self.out(torch.cat([h, x], -1))
