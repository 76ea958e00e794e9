"""Expectation maximisation of a Gaussian mixture over posteriors instead of draws of them.

A mixture fitted to one draw of each posterior takes the draws' noise for structure, the more so the
more components and latents there are. Here each image counts with its whole posterior: what is
raised is the mean over images of log sum_k w_k exp(E[log N_k(z)]), E over q(z | x), a lower bound
of E_q[log p(z)] that is exact for codes without a scale.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.normal import LOG_2_PI
from ncprior.priors.codes import Codes

SMALLEST_VARIANCE = 1e-6  # is added to every covariance, as scikit-learn does
NEGLIGIBLE = 1e-6  # responsibility of a component for an image
NUMBERS_AT_ONCE = 1 << 24


class Parts(NamedTuple):
    """The parameters of a mixture of m components."""

    log_weights: Tensor  # (m,)
    means: Tensor  # (m, d)
    cholesky: Tensor  # (m, d, d), of the covariances, lower


class _Members(NamedTuple):
    """The images that a component is responsible for."""

    rows: Tensor  # (r,)
    shares: Tensor  # (r,)


def expectation_maximisation(
    codes: Codes, parts: Parts, *, max_iter: int, tol: float
) -> tuple[Parts, int, float]:
    """The mixture, the iterations it took and the bound in nats before the last of them.

    Args:
        codes: What the encoder says of the images.
        parts: Where to start; see `clusters`.
        max_iter: Iterations at most.
        tol: Gain of the bound, in nats, below which it ends.
    """
    bound, iterations, gain = -math.inf, 0, math.inf
    while iterations < max_iter and gain >= tol:
        members, now = _expect(codes, parts)
        parts = _maximise(codes, members, parts)
        bound, iterations, gain = now, iterations + 1, now - bound
    return parts, iterations, bound


def clusters(codes: Codes, components: int, *, seed: int) -> Parts:
    """The clusters that scikit-learn's k-means finds among the posterior means, as a mixture."""
    from sklearn.cluster import KMeans

    means = KMeans(components, n_init=1, random_state=seed).fit(codes.loc.double().cpu().numpy())
    labels = torch.from_numpy(means.labels_).to(codes.loc.device)
    rows = [(labels == k).nonzero().squeeze(1) for k in range(components)]
    return _maximise(codes, [_Members(r, codes.loc.new_ones(len(r))) for r in rows], None)


def _maximise(codes: Codes, members: list[_Members], last: Parts | None) -> Parts:
    """Weights, means and covariances given who is responsible; empty components stay put."""
    weights, means, cholesky = [], [], []
    for k, (rows, shares) in enumerate(members):
        total = shares.sum()
        weights.append(total.clamp_min(torch.finfo(total.dtype).tiny))
        if last is not None and float(total) < 1:
            means.append(last.means[k])
            cholesky.append(last.cholesky[k])
            continue
        loc, share = codes.loc[rows], (shares / total)[:, None]
        mean = (share * loc).sum(0)
        centred = loc - mean
        covariance = ((share * centred).T @ centred).double()
        noise = (share * codes.scale[rows].square()).sum(0).double()
        covariance += (noise + SMALLEST_VARIANCE).diag()
        means.append(mean)
        cholesky.append(torch.linalg.cholesky(covariance).to(loc))
    log_weights = torch.stack(weights).log()
    return Parts(log_weights - log_weights.logsumexp(0), torch.stack(means), torch.stack(cholesky))


def _expect(codes: Codes, parts: Parts) -> tuple[list[_Members], float]:
    """Who is responsible for whom, and the bound."""
    m, d = parts.means.shape
    eye = torch.eye(d, dtype=parts.means.dtype, device=parts.means.device)
    white = torch.linalg.solve_triangular(parts.cholesky, eye, upper=False)  # (m, d, d)
    at_mean = torch.einsum("mij,mj->mi", white, parts.means)[:, None]
    log_det = parts.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
    constant = parts.log_weights - log_det - 0.5 * d * LOG_2_PI
    precision = white.square().sum(1)  # (m, d), the diagonal of each inverse covariance
    total, found = 0.0, []
    step = max(1, NUMBERS_AT_ONCE // (m * d))
    for first in range(0, len(codes.loc), step):
        some = slice(first, first + step)
        loc = codes.loc[some]
        standard = torch.baddbmm(at_mean, loc.expand(m, -1, -1), white.mT, beta=-1)
        spread = precision @ codes.scale[some].square().T
        log_p = constant[:, None] - 0.5 * (standard.square().sum(-1) + spread)  # (m, n)
        each = log_p.logsumexp(0)
        total += float(each.double().sum())
        shares = (log_p - each).exp()
        k, row = (shares > NEGLIGIBLE).nonzero(as_tuple=True)
        sizes = torch.bincount(k, minlength=m).tolist()
        pieces = zip((row + first).split(sizes), shares[k, row].split(sizes), strict=True)
        found.append(list(pieces))
    members = [
        _Members(*(torch.cat(part) for part in zip(*of_component, strict=True)))
        for of_component in zip(*found, strict=True)
    ]
    return members, total / len(codes.loc)
