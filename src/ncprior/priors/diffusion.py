"""A diffusion prior: a small network that carries N(0, I) to the codes along a smooth flow.

Noise and data are mixed as on a circle, x_a = cos(a) x_0 + sin(a) e with e from N(0, I): x_a is
data at a = 0 and noise at a = pi/2. What is learned is the velocity u(x, a) = E[dx_a/da | x_a = x],
as the one of a Gaussian with the codes' moments, known in closed form, plus a network. A network
that has learned nothing leaves that Gaussian.
"""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ncprior.normal import LOG_2_PI
from ncprior.numerics import stream
from ncprior.priors.codes import Codes
from ncprior.priors.fitting import Report, descend, first_weights, ignore
from ncprior.priors.latent import LatentPrior

EXACT_UP_TO = 16
"""Latent size up to which the divergence is exact unless `probes` says otherwise."""
FREQUENCIES = 8
ROWS_AT_ONCE = 4096
SMALLEST_VARIANCE = 1e-5  # of the standardised codes along an axis


class LogProbEstimate(NamedTuple):
    value: Tensor  # (...), log-density in nats
    se: Tensor  # (...), standard error over the probes; 0 where the divergence is exact


class DiffusionPrior(LatentPrior):
    """A density over latents of size d, sampled by an ordinary differential equation.

    Args:
        latent_size: d.
        width: Width of the network.
        blocks: Its residual blocks.
        solver_steps: Runge-Kutta steps from noise to code, and back for the density; each takes
            four evaluations of the network.
        probes: Random probes of the divergence in `log_prob`; 0 for the exact one, at the cost of
            d probes. By default exact up to d = 16 and 8 probes beyond.
        temperature: Standard deviation of the noise that the flow starts from.

    Reference: the probability-flow equation of Song et al. (arXiv 2011.13456, Eq. 13 and 39),
    learned by flow matching (Lipman et al., arXiv 2210.02747) on the circular path of Albergo and
    Vanden-Eijnden (arXiv 2209.15571); Hutchinson's estimator as in FFJORD (Grathwohl et al.,
    arXiv 1810.01367). The Gaussian part and the mean over each posterior (`matching_loss`) are
    ours.
    """

    normalized = True
    slow_density = True
    slow_draws = True
    axes: Tensor  # (d, d), principal axes of the standardised codes, one a column
    variances: Tensor  # (d,) along them

    def __init__(
        self,
        latent_size: int,
        *,
        width: int = 256,
        blocks: int = 3,
        solver_steps: int = 16,
        probes: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__(latent_size)
        if min(width, blocks, solver_steps) < 1:
            raise ValueError(
                "width, blocks and solver_steps must be at least 1, "
                f"got {width}, {blocks}, {solver_steps}"
            )
        if probes is None:
            probes = 0 if latent_size <= EXACT_UP_TO else 8
        if probes < 0 or not temperature > 0:
            raise ValueError(
                f"probes must be at least 0 and temperature positive, got {probes=}, {temperature=}"
            )
        self.width, self.blocks, self.solver_steps = width, blocks, solver_steps
        self.probes, self.temperature = probes, temperature
        self.register_buffer("axes", torch.eye(latent_size))
        self.register_buffer("variances", torch.ones(latent_size))
        self.network = Network(latent_size, width, blocks)

    @property
    def config(self) -> dict[str, Any]:
        names = ("latent_size", "width", "blocks", "solver_steps", "probes", "temperature")
        return {name: getattr(self, name) for name in names}

    def standardize(self, codes: Codes) -> None:
        """Take each latent's mean and spread, and the axes of what then remains, from codes."""
        super().standardize(codes)
        loc, scale = self.inner(codes.loc).double(), (codes.scale / self.spread).double()
        covariance = torch.cov(loc.T, correction=0).view(self.latent_size, -1)
        values, axes = torch.linalg.eigh(covariance + scale.square().mean(0).diag())
        self.axes.copy_(axes)
        self.variances.copy_(values.clamp_min(SMALLEST_VARIANCE))

    def velocity(self, x: Tensor, angle: Tensor) -> Tensor:
        """u(x, a) (n, d) for standardised x (n, d) and angles (n,)."""
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        rate = sin * cos * (1 - self.variances) / (cos.square() * self.variances + sin.square())
        return (x @ self.axes * rate) @ self.axes.T + self.network(x, angle)

    @torch.no_grad()
    def sample(
        self, sample_shape: Sequence[int] = (), *, generator: Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, d)."""
        shape = (math.prod(sample_shape), self.latent_size)
        options: Any = {"device": self.loc.device, "dtype": self.loc.dtype}
        noise = self.temperature * torch.randn(shape, generator=generator, **options)
        parts = [self._decode(part) for part in noise.split(ROWS_AT_ONCE)]
        return self.outer(torch.cat(parts)).view(*sample_shape, self.latent_size)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats of z (..., d), (...): normalised but for the solver's error.

        With `probes` it is unbiased and random, the same whenever it is asked for; its error is
        that of `estimate_log_prob`. Slow: it solves the equation for each z.
        """
        return self.estimate_log_prob(value).value

    def estimate_log_prob(
        self, value: Tensor, *, generator: Generator | None = None, probes: int | None = None
    ) -> LogProbEstimate:
        """The log-density in nats of z (..., d) and the standard error that its probes leave.

        Args:
            value: z (..., d).
            generator: Source of the probes; by default they are the same each time.
            probes: Hutchinson's probes for each z; 0 for the exact divergence; as the prior was
                made by default. One probe has an unknown error, NaN.
        """
        probes = self.probes if probes is None else probes
        if probes and generator is None:
            generator = stream(0, "divergence probes", device=self.loc.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and value.requires_grad):
            x = self.inner(value.reshape(-1, self.latent_size))
            found = [self._log_prob(part, probes, generator) for part in x.split(ROWS_AT_ONCE)]
            log_prob = torch.cat([each for each, _ in found]) + self.log_det()
            se = torch.cat([each for _, each in found])
        return LogProbEstimate(log_prob.view(value.shape[:-1]), se.view(value.shape[:-1]))

    def tempered(self, temperature: float) -> "DiffusionPrior":
        """The same flow from noise of standard deviation times `temperature`."""
        if temperature == 1:
            return self
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        other = copy.copy(self)
        other.temperature = self.temperature * temperature
        return other

    @classmethod
    def fit(
        cls,
        codes: Codes,
        *,
        seed: int = 0,
        report: Report = ignore,
        steps: int = 3000,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.01,
        average: float = 0.999,
        heldout: float = 0.05,
        patience: int = 10,
        **options: Any,
    ) -> Self:
        """Fit to codes by flow matching; the weights of the best held-out loss are kept.

        Args:
            codes: What the encoder says of the training images.
            seed: Decides the weights, the batches and what is held out.
            report: See `descend`.
            steps: Optimiser steps at most.
            batch_size: Codes per step.
            learning_rate: Of the first step; it falls to zero.
            weight_decay: That of AdamW.
            average: Decay of the moving average of the weights.
            heldout: Share of the codes that only decide when to stop.
            patience: Held-out losses, one every 200 steps, without a new best before it stops.
            options: Those of the constructor, such as `width` and `blocks`.

        Raises:
            ValueError: codes that cannot be fitted, or a setting out of range.
        """
        train, left = codes.checked().split(heldout, seed=seed)
        with first_weights(seed):
            prior = cls(codes.latent_size, **options)
        prior = prior.to(codes.loc)
        prior.standardize(train)
        device = codes.loc.device

        def matching(part: Codes, num: int, generator: Generator) -> Tensor:
            rows = torch.randint(len(part.loc), (num,), generator=generator, device=device)
            loc, scale = prior.inner(part.loc[rows]), part.scale[rows] / prior.spread
            return matching_loss(prior.velocity, loc, scale, generator=generator)

        @torch.no_grad()
        def heldout_loss() -> float:
            num = max(4096, len(left.loc))
            return float(matching(left, num, stream(seed, "held-out noise", device=device)))

        descend(
            prior,
            lambda generator: matching(train, batch_size, generator),
            heldout_loss,
            steps=steps,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clip_norm=1.0,
            evaluate_every=200,
            patience=patience,
            seed=seed,
            report=report,
            average=average,
        )
        return prior.requires_grad_(False)

    def _grid(self) -> Tensor:
        """Angles from data (0) to noise (pi/2), closest where the codes' detail is."""
        share = torch.linspace(0, 1, self.solver_steps + 1, dtype=torch.float64)
        return (math.pi / 2 * share.square()).to(self.loc)

    def _decode(self, x: Tensor) -> Tensor:
        """Noise (n, d) to standardised codes."""
        for start, end in itertools.pairwise(self._grid().flip(0)):
            (x,) = runge_kutta(lambda a, x: (self.velocity(x, a.expand(len(x))),), start, end, (x,))
        return x

    def _log_prob(
        self, x: Tensor, probes: int, generator: Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Log-density (n,) of standardised codes (n, d) and its standard error."""
        n, d = x.shape
        if probes:
            signs = torch.randint(0, 2, (probes, n, d), generator=generator, device=x.device)
            directions = 2.0 * signs.to(x) - 1
        else:
            directions = torch.eye(d).to(x)[:, None].expand(-1, n, -1)
        gained = x.new_zeros(len(directions), n)
        for start, end in itertools.pairwise(self._grid()):
            x, gained = runge_kutta(
                lambda a, x, _: self._along(x, a, directions), start, end, (x, gained)
            )
        noise = x / self.temperature
        at_noise = -0.5 * (noise.square() + LOG_2_PI).sum(-1) - d * math.log(self.temperature)
        if not probes:
            return at_noise + gained.sum(0), torch.zeros_like(at_noise)
        return at_noise + gained.mean(0), gained.std(0) / math.sqrt(probes)

    def _along(self, x: Tensor, a: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """The velocity (n, d) at x, and e^T (du/dx) e (p, n) for directions e (p, n, d)."""
        onward = torch.is_grad_enabled()
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            u = self.velocity(x, a.expand(len(x)))
            slopes = [
                (torch.autograd.grad(u, x, e, retain_graph=True, create_graph=onward)[0] * e).sum(1)
                for e in directions
            ]
        slope = torch.stack(slopes)
        return (u, slope) if onward else (u.detach(), slope.detach())


class Network(nn.Module):
    """Linear, residual blocks that the angle scales and shifts, linear; zero before training."""

    def __init__(self, size: int, width: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Linear(size, width)
        self.clock = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU())
        self.blocks: Any = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        """What is added to the velocity (n, d) at x (n, d) and angles (n,)."""
        waves = angle[:, None] * torch.arange(1, FREQUENCIES + 1).to(angle)
        time = self.clock(torch.cat([waves.cos(), waves.sin()], dim=-1))
        hidden = self.stem(x)
        for block in self.blocks:
            hidden = block(hidden, time)
        return self.head(F.silu(F.layer_norm(hidden, hidden.shape[-1:])))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        gain, shift = self.modulate(time).chunk(2, dim=-1)
        seen = F.layer_norm(x, x.shape[-1:]) * (1 + gain) + shift
        return x + self.leave(F.silu(self.enter(seen)))


def matching_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    loc: Tensor,
    scale: Tensor,
    *,
    generator: Generator,
) -> Tensor:
    """Mean square of u(x_a, a) less E[dx_a/da | x_a, i], summed over d, ().

    Row i's data are draws of N(loc_i, scale_i^2), (n, d) each. The velocity given its row is known
    in closed form: the mean over rows is that of single draws, with less noise. Angles are spread
    evenly over [0, pi/2], one in each of n equal parts.
    """
    n = len(loc)
    options: Any = {"device": loc.device, "dtype": loc.dtype}
    offset = torch.rand(n, generator=generator, **options)
    angle = (torch.arange(n, **options) + offset) * (math.pi / 2 / n)
    noise = torch.randn(loc.shape, generator=generator, **options)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    spread = (cos.square() * scale.square() + sin.square()).sqrt()  # of x_a, given the row
    growth = sin * cos * (1 - scale.square()) / spread  # its derivative by the angle
    error = velocity(cos * loc + spread * noise, angle) - (growth * noise - sin * loc)
    return error.square().sum(-1).mean()


State = tuple[Tensor, ...]


def runge_kutta(change: Callable[..., State], start: Tensor, end: Tensor, state: State) -> State:
    """One classical step of fourth order; change(at, *state) is the state's derivative."""
    step = end - start
    middle = start + 0.5 * step

    def after(size: Tensor, by: State) -> State:
        return tuple(s + size * d for s, d in zip(state, by, strict=True))

    first = change(start, *state)
    second = change(middle, *after(0.5 * step, first))
    third = change(middle, *after(0.5 * step, second))
    fourth = change(end, *after(step, third))
    slopes = zip(first, second, third, fourth, strict=True)
    return after(step / 6, tuple(a + 2 * b + 2 * c + d for a, b, c, d in slopes))
