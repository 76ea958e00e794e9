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
from ncprior.products import ROWS, affine

SMALLEST_VARIANCE = 1e-6  # is added to every covariance, as scikit-learn does
NEGLIGIBLE = 1e-6  # responsibility of a component for an image
ALL_EVERY = 5
"""Iterations after which each image is compared with all components again; in between with those
alone that were responsible for it then, of a hundred two on average."""
NUMBERS_AT_ONCE, AT_MOST = 1 << 20, 1 << 23
"""Numbers of a block: few, to stay near the processor, but more where rows would be fewer than make
a product fast."""


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
        max_iter: Iterations at most; with the last of them the bound may be a little low, since
            most compare images with few components only.
        tol: Gain of the bound, in nats, below which it ends, in an iteration with all components.
    """
    bound, iterations, settled = -math.inf, 0, False
    members: list[_Members] = []
    while iterations < max_iter:
        among_all = settled or iterations % ALL_EVERY == 0
        members, now = _expect(codes, parts) if among_all else _expect_among(codes, parts, members)
        parts = _maximise(codes, members, parts)
        settled = not now - bound >= tol
        bound, iterations = now, iterations + 1
        if settled and among_all:
            break
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
    m = len(parts.means)
    white = inverse(parts.cholesky)
    precision = white.square().sum(1)  # (m, d), the diagonal of each inverse covariance
    total, found = 0.0, []
    step = rows_of(m)
    for first in range(0, len(codes.loc), step):
        some = slice(first, first + step)
        spread = codes.scale[some].square() @ precision.T
        log_p = log_densities(codes.loc[some], parts, white) - 0.5 * spread  # (n, m)
        each = log_p.logsumexp(1, keepdim=True)
        total += float(each.double().sum())
        shares = (log_p - each).exp().T
        k, row = (shares > NEGLIGIBLE).nonzero(as_tuple=True)
        sizes = torch.bincount(k, minlength=m).tolist()
        pieces = zip((row + first).split(sizes), shares[k, row].split(sizes), strict=True)
        found.append(list(pieces))
    members = [
        _Members(*(torch.cat(part) for part in zip(*of_component, strict=True)))
        for of_component in zip(*found, strict=True)
    ]
    return members, total / len(codes.loc)


def _expect_among(
    codes: Codes, parts: Parts, members: list[_Members]
) -> tuple[list[_Members], float]:
    """The same among the components that are responsible for each image already."""
    white, constant, found = inverse(parts.cholesky), _constants(parts), []
    for k, (rows, _) in enumerate(members):
        distances = ((codes.loc[rows] - parts.means[k]) @ white[k].T).square().sum(1)
        spread = codes.scale[rows].square() @ white[k].square().sum(0)
        found.append(constant[k] - 0.5 * (distances + spread))
    log_p, rows = torch.cat(found), torch.cat([rows for rows, _ in members])
    nothing = log_p.new_zeros(len(codes.loc))
    top = nothing.scatter_reduce(0, rows, log_p, "amax", include_self=False)
    each = nothing.index_add(0, rows, (log_p - top[rows]).exp()).log() + top
    shares = (log_p - each[rows]).exp().split([len(rows) for rows, _ in members])
    again = [_Members(rows, share) for (rows, _), share in zip(members, shares, strict=True)]
    return again, float(each.double().mean())


def log_densities(z: Tensor, parts: Parts, white: Tensor) -> Tensor:
    """log w_k N_k(z) in nats of z (n, d), (n, m).

    Args:
        z: Points.
        parts: The mixture.
        white: Inverses of its Cholesky factors, (m, d, d).
    """
    m, d = parts.means.shape
    offset = torch.einsum("mij,mj->mi", white, parts.means).flatten()
    weight = white.reshape(m * d, d).T
    distances = [
        torch.linalg.vector_norm(affine(part, weight, -offset).view(-1, m, d), dim=-1)
        for part in z.contiguous().split(rows_of(m * d))
    ]
    return _constants(parts) - 0.5 * torch.cat(distances).square()


def rows_of(size: int) -> int:
    """How many rows of so many numbers make a block."""
    rows = max(NUMBERS_AT_ONCE // size, min(ROWS, AT_MOST // size), 1)
    return rows if rows < ROWS else rows // ROWS * ROWS


def _constants(parts: Parts) -> Tensor:
    """log w_k N_k at the means, (m,)."""
    log_det = parts.cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
    return parts.log_weights - log_det - 0.5 * parts.means.shape[1] * LOG_2_PI


def inverse(cholesky: Tensor) -> Tensor:
    """Inverses of Cholesky factors (m, d, d)."""
    eye = torch.eye(cholesky.shape[-1], dtype=cholesky.dtype, device=cholesky.device)
    return torch.linalg.solve_triangular(cholesky, eye, upper=False)
