"""Mean and covariance of p r, set to those of q after the classifier is fitted.

On few images a classifier errs in what is easiest to measure: mean and covariance of the density
that it implies. The density nearest to p r (in relative entropy) with those of q is p r exp(a'w +
w'Bw) / Z, and a, B solve a convex problem over draws of p. It is dropped where held-out images
speak against it, and where too few draws of p count under it to say anything: there, and where
there are many images, it fits noise.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ncprior.numerics import effective_sample_size, stream
from ncprior.ratios import MatchedRatio
from ncprior.training.heldout import HeldOut
from ncprior.training.pairs import draw_pairs

RIDGE = 0.01  # on a and B: what they may be is bounded where draws say little
EFFECTIVE_PER_NUMBER = 2  # draws of p that must count for each number in a and B
ITERATIONS = 100
OBJECTION = 2.0  # standard errors


class Matched(NamedTuple):
    """A ratio, and what was found of matching moments."""

    ratio: Any  # the one that came in, where the matched one was dropped
    figures: dict[str, Any]


@torch.no_grad()
def match_moments(
    ratio: Any, vae: Any, table: Any, held: HeldOut, *, draws: int, seed: int
) -> Matched:
    """Add to log r what gives p r the mean and covariance of q, unless held-out images object.

    They do where E_q[log r] - log Z, which is by how much the ELBO under p r exceeds that under p,
    falls by more than two standard errors, over their draws of q and fresh draws of p. Of those at
    least two for each number of a and B must count, with the terms and without; else they are
    dropped, since neither log Z nor its error is known.

    Args:
        ratio: A calibrated network of one group of flat latents.
        vae: The frozen VAE on its base prior.
        table: Evidence of the images that it was fitted on.
        held: Draws of held-out images.
        draws: Of q and p, to solve with; and as many fresh ones of p to judge by.
        seed: Seed of the draws.

    Reference: the tilt of least relative entropy under moment constraints (Csiszar, "I-divergence
    geometry", 1975).
    """
    device = table.device
    rows = torch.arange(draws, device=device) % len(table)
    drawn = draw_pairs(vae, table[rows], draws, stream(seed, "moments", 0, device), held.groups)[0]
    fresh = draw_pairs(vae, table[rows], draws, stream(seed, "moments", 1, device), held.groups)[0]
    at_p = _log_r(ratio, drawn.prior)
    numbers = math.comb(drawn.posterior.shape[1] + 2, 2) - 1
    ess = float(effective_sample_size(at_p))
    figures: dict[str, Any] = {"kept": False, "effective_draws": ess, "numbers": numbers}
    enough = EFFECTIVE_PER_NUMBER * numbers
    if ess < enough:
        return Matched(ratio, figures)
    matched = MatchedRatio(ratio)
    _whiten(matched, drawn.posterior)
    _solve(matched, drawn.posterior, drawn.prior, at_p)
    matched.eval().requires_grad_(False)
    own, tilt = _log_r(ratio, fresh.prior), _each(matched.tilt, fresh.prior).double()
    figures["effective_draws_matched"] = left = float(effective_sample_size(own + tilt))
    if left < enough:
        return Matched(ratio, figures)
    at_q = torch.cat([_each(matched.tilt, pairs[0].posterior) for pairs in held]).double()
    per_image = at_q.view(-1, held.images).mean(0)
    change = float((own + tilt).logsumexp(0) - own.logsumexp(0))  # of log Z
    weights, moved = own.softmax(0), (tilt - change).exp()
    z_se = float((weights.square() * (moved - 1).square()).sum().sqrt())
    se = math.hypot(float(per_image.std()) / math.sqrt(held.images), z_se)
    gain = float(per_image.mean()) - change
    kept = gain > -OBJECTION * se
    figures |= {"heldout_gain": gain, "heldout_gain_se": se, "kept": kept}
    return Matched(matched if kept else ratio, figures)


def _whiten(matched: MatchedRatio, posterior: Tensor) -> None:
    """Coordinates in which these draws have mean 0 and covariance 1."""
    z = posterior.double()
    covariance = torch.cov(z.T).view(z.shape[1], -1)  # one latent gives a number, not a matrix
    spread = torch.linalg.cholesky(covariance)
    eye = torch.eye(len(spread), dtype=z.dtype, device=z.device)
    matched.centre.copy_(z.mean(0))
    matched.whitening.copy_(torch.linalg.solve_triangular(spread, eye, upper=False))
    matched.radius.fill_(math.inf)
    matched.radius.copy_(matched.white(posterior).norm(dim=1).max())


def _solve(matched: MatchedRatio, posterior: Tensor, prior: Tensor, at_p: Tensor) -> None:
    """a and B by the convex dual: log E_p[r exp(a'w + w'Bw)] less its mean under q."""
    w, of_q = matched.white(prior).double(), matched.white(posterior).double()
    mean, second = of_q.mean(0), of_q.T @ of_q / len(of_q)
    a = torch.zeros_like(mean, requires_grad=True)
    b = torch.zeros_like(second, requires_grad=True)
    descent = torch.optim.LBFGS([a, b], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        symmetric = (b + b.T) / 2
        log_w = at_p + (w * (a + w @ symmetric)).sum(-1)
        value = log_w.logsumexp(0) - a @ mean - (symmetric * second).sum()
        value = value + RIDGE * (a.square().sum() / 2 + symmetric.square().sum())
        value.backward()
        return value.detach()

    with torch.enable_grad():
        descent.step(loss)
    matched.linear.copy_(a.detach())
    matched.quadratic.copy_((b + b.T).detach() / 2)
    moved = at_p + _each(matched.tilt, prior)  # the mean of r under p stays what it was
    matched.offset.add_(float(moved.logsumexp(0) - at_p.logsumexp(0)))


def _log_r(ratio: Any, z: Tensor) -> Tensor:
    return _each(ratio, z, ratio.chunk).double()


def _each(function: Any, z: Tensor, rows: int = 8192) -> Tensor:
    return torch.cat([function(part) for part in z.split(rows)])
