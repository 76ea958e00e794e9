"""Energies and priors whose joint density with a linear VAE is normal, known in closed form."""

import torch
from torch import nn
from toys import ExactFlat

from ncprior.priors import NoiseContrastivePrior

C, SIGMA, TARGET = 0.05, 0.04, 0.6
"""Images are 0.5 + C z + SIGMA eps, so narrow that cutting them to [0, 1] changes nothing."""


def linear_vae():
    return ExactFlat(size=2, c=C, sigma=SIGMA).eval().requires_grad_(False)


class Quadratic(nn.Module):
    """E(x) = (k / 2) |x - target|^2."""

    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, images):
        return 0.5 * self.k * (images - TARGET).flatten(1).square().sum(1)


class Linear(nn.Module):
    """E(x) = -theta sum(x), which tilts a normal x without changing its covariance."""

    def __init__(self, theta=0.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor(theta, dtype=torch.float64))

    def forward(self, images):
        return -self.theta * images.flatten(1).sum(1)


class Tilt(nn.Module):
    """log r(z) = a sum(z)."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


def tilted_prior(a, base=None):
    return NoiseContrastivePrior([Tilt(a)], base)


def exact_law(k, pixel_noise=True, tilt=0.0, mean=0.0, spread=1.0, steps=None, eta=0.0):
    """Mean and covariance of (z, eps) of one pixel under exp(a z) N(z; mean, spread^2) ... exp(-E).

    With `eta` those of Langevin dynamics without correction, which shift a normal law exactly to
    another: the stationary ones, or after `steps` from the prior (without its tilt).
    """
    a = torch.tensor([[C, SIGMA if pixel_noise else 0.0]], dtype=torch.float64)
    prior = torch.diag(torch.tensor([spread**-2, 1.0], dtype=torch.float64))
    precision = prior + k * a.T @ a
    pull = torch.tensor([mean / spread**2 + tilt, 0.0], dtype=torch.float64)
    pull = pull + k * (TARGET - 0.5) * a[0]
    goal, eye = torch.linalg.solve(precision, pull), torch.eye(2, dtype=torch.float64)
    shrink = eye - 0.5 * eta * precision
    if steps is None:
        return goal, torch.linalg.inv(precision @ (eye - 0.25 * eta * precision))
    location, covariance = torch.tensor([mean, 0.0], dtype=torch.float64), prior.inverse()
    for _ in range(steps):
        location = goal + shrink @ (location - goal)
        covariance = shrink @ covariance @ shrink.T + eta * eye
    return location, covariance
