"""An autoregressive model over latent dimensions: p(z) = prod_i p(z_i | z_<i)."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ncprior.normal import LOG_2_PI
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, first_weights, ignore, maximise_likelihood
from ncprior.priors.latent import LatentPrior

SMALLEST_SCALE = 1e-3


class Conditional(NamedTuple):
    """Mixtures of m normals for the next coordinate, (..., m) each."""

    log_weights: Tensor
    means: Tensor
    scales: Tensor

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of value (...), shape (...)."""
        standard = (value[..., None] - self.means) / self.scales
        each = self.log_weights - self.scales.log() - 0.5 * (standard.square() + LOG_2_PI)
        return each.logsumexp(-1)

    def pick(self, uniform: Tensor, noise: Tensor) -> Tensor:
        """The draw that belongs to uniform and normal noise (...) of one's own, (...)."""
        edges = self.log_weights.exp().cumsum(-1)
        picks = (uniform[..., None] * edges[..., -1:] >= edges).sum(-1, keepdim=True)
        picks = picks.clamp_max(edges.shape[-1] - 1)
        return self.means.gather(-1, picks)[..., 0] + noise * self.scales.gather(-1, picks)[..., 0]


class AutoregressivePrior(LatentPrior):
    """Each coordinate a mixture of normals, whose parameters a masked network finds.

    Args:
        latent_size: d.
        hidden: Widths of the layers.
        components: Normals m of each conditional.

    A unit of degree k sees the first k coordinates, and the parameters of coordinate i see units
    of degree below i. Units are sorted by degree, so that a draw computes each of them once: d
    steps cost no more than one evaluation of the network.

    References: Germain et al. (ICML 2015, MADE), Uria et al. (2013, RNADE: mixture conditionals).
    """

    normalized = True

    def __init__(
        self, latent_size: int, *, hidden: Sequence[int] = (256, 256), components: int = 10
    ) -> None:
        super().__init__(latent_size)
        if components < 1 or not hidden or min(hidden) < 1:
            raise ValueError(
                f"components and hidden must be at least 1, got {components} and {hidden}"
            )
        self.hidden, self.components = tuple(hidden), components
        degrees = [torch.arange(1, latent_size + 1)]
        widths = [latent_size, *hidden]
        for width in hidden:  # degrees from 1 to d - 1, as even as can be
            degrees.append(1 + torch.arange(width) * (latent_size - 1) // width)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.out = nn.Linear(widths[-1], latent_size * 3 * components)
        self.skip = nn.Linear(latent_size, latent_size * 3 * components, bias=False)
        masks = [b[:, None] >= a for a, b in itertools.pairwise(degrees)]
        target = degrees[0].repeat_interleave(3 * components)[:, None]
        masks += [target > degrees[-1], target > degrees[0]]
        for i, mask in enumerate(masks):
            self.register_buffer(f"mask_{i}", mask.float(), persistent=False)
        # How many units of each layer see only the first k coordinates, k = 0 to d - 1.
        self.known = [
            [int((degree <= k).sum()) for k in range(latent_size)] for degree in degrees[1:]
        ]
        self._spread_out()

    @property
    def config(self) -> dict[str, Any]:
        return {
            "latent_size": self.latent_size,
            "hidden": list(self.hidden),
            "components": self.components,
        }

    @torch.no_grad()
    def _spread_out(self) -> None:
        """Start with conditionals near N(0, 1) whose components differ."""
        for layer in (self.out, self.skip):
            layer.weight.mul_(0.1)
        bias = self.out.bias.view(self.latent_size, 3, self.components)
        bias.zero_()
        bias[:, 1] = torch.linspace(-1, 1, self.components + 2)[1:-1]

    def _masked(self) -> list[Tensor]:
        weights: list[Any] = [layer.weight for layer in self.layers] + [
            self.out.weight,
            self.skip.weight,
        ]
        return [w * getattr(self, f"mask_{i}") for i, w in enumerate(weights)]

    def _conditional(self, raw: Tensor) -> Conditional:
        weights, means, scales = raw.unflatten(-1, (-1, 3, self.components)).unbind(-2)
        return Conditional(weights.log_softmax(-1), means, F.softplus(scales) + SMALLEST_SCALE)

    def log_prob(self, value: Tensor) -> Tensor:
        """Normalised log-density in nats of z (..., d), shape (...)."""
        x = self.inner(value)
        return self.conditional(x).log_prob(x).sum(-1) + self.log_det()

    def conditional(self, x: Tensor) -> Conditional:
        """The density of each coordinate of x (..., d), standardised, given those before it.

        Its tensors are (..., d, m).
        """
        *weights, out, skip = self._masked()
        biases: list[Any] = [layer.bias for layer in self.layers]
        h = x
        for weight, bias in zip(weights, biases, strict=True):
            h = F.silu(F.linear(h, weight, bias))
        return self._conditional(F.linear(h, out, self.out.bias) + F.linear(x, skip))

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d), one coordinate after the other."""
        shape = (math.prod(sample_shape), self.latent_size)
        options: Any = {"device": self.loc.device, "dtype": self.loc.dtype}
        uniform = torch.rand(shape, generator=generator, **options)
        noise = torch.randn(shape, generator=generator, **options)
        *weights, out, skip = self._masked()
        biases: list[Any] = [layer.bias for layer in self.layers]
        size = 3 * self.components
        x = torch.zeros(shape, **options)
        units = [torch.zeros(shape[0], width, **options) for width in self.hidden]
        for i in range(self.latent_size):
            h, seen = x, i
            for k, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                old, new = self.known[k][i - 1] if i else 0, self.known[k][i]
                if new > old:
                    part = F.linear(h[:, :seen], weight[old:new, :seen], bias[old:new])
                    units[k][:, old:new] = F.silu(part)
                h, seen = units[k], new
            rows = slice(i * size, (i + 1) * size)
            raw = F.linear(h[:, :seen], out[rows, :seen], self.out.bias[rows])
            raw = raw + F.linear(x[:, :i], skip[rows, :i])
            x[:, i] = self._conditional(raw).pick(uniform[:, i : i + 1], noise[:, i : i + 1])[:, 0]
        return self.outer(x).view(*sample_shape, self.latent_size)

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        hidden: Sequence[int] = (256, 256),
        components: int = 10,
        steps: int = 1500,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        heldout: float = 0.1,
        seed: int = 0,
        report: Report = ignore,
    ) -> "AutoregressivePrior":
        """Fit by maximum likelihood; the arguments are those of the class and of `descend`."""
        size = codes.checked().latent_size
        with first_weights(seed):
            prior = cls(size, hidden=hidden, components=components)
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
