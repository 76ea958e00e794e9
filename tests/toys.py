"""VAEs whose densities are known in closed form."""

import math

import torch
from torch import nn
from torch.distributions import Normal as TorchNormal

from ncprior.normal import Normal, StandardNormal
from ncprior.vaes import FlatVAE, Gaussian
from ncprior.vaes.likelihoods import GaussianEmission
from ncprior.walk import Group

SPREAD = 0.08  # of the toy data around 0.5: six standard deviations fit into [0, 1]


def gaussian_images(n, generator, size=2):
    """Images (n, 1, 1, size) whose pixels are N(0.5, SPREAD^2)."""
    noise = torch.randn(n, 1, 1, size, generator=generator)
    return (0.5 + SPREAD * noise).clamp(0, 1)


class LinearEncoder(nn.Module):
    """Posterior N(m + sqrt(s^2 - t^2) u, t^2), u the standardised pixels: q(z) = N(m, s^2)."""

    def __init__(self, mean=0.8, spread=0.6, noise=0.3):
        super().__init__()
        self.mean, self.gain, self.noise = mean, math.sqrt(spread**2 - noise**2), noise

    def forward(self, images):
        u = (images.flatten(1) - 0.5) / SPREAD
        return self.mean + self.gain * u, torch.full_like(u, math.log(self.noise))


class Reshape(nn.Module):
    """A linear decoder to images (n, 1, 1, size), which undoes `LinearEncoder`."""

    def __init__(self, size=2, mean=0.8, spread=0.6):
        super().__init__()
        self.layer = nn.Linear(size, size)
        with torch.no_grad():
            self.layer.weight.copy_(SPREAD / spread * torch.eye(size))
            self.layer.bias.fill_(0.5 - SPREAD / spread * mean)

    def forward(self, z):
        return self.layer(z)[:, None, None]


def linear_vae(mean=0.8, spread=0.6, noise=0.3, size=2):
    """A flat VAE whose aggregate posterior on `gaussian_images` is N(mean, spread^2 I)."""
    encoder = LinearEncoder(mean, spread, noise)
    return FlatVAE(
        encoder,
        Reshape(size, mean, spread),
        Gaussian(0.1),
        latent_size=size,
        posterior_scale="log_scale",
    ).eval()


def true_log_ratio(z, mean=0.8, spread=0.6):
    """log N(z; mean, spread^2 I) - log N(z; 0, I), (n,)."""
    return (TorchNormal(mean, spread).log_prob(z) - TorchNormal(0.0, 1.0).log_prob(z)).sum(-1)


class TwoGroups(nn.Module):
    """z1 ~ N(0, 1), z2 ~ N(b z1, s^2), x ~ N(0.5 + c z2 + e z1, sigma^2), per coordinate.

    Written as a user would write an adapter. Its encoder is the exact posterior, with the scale of
    z1's widened by `widen`.
    """

    num_groups = 2

    def __init__(self, size=3, widen=1.0):
        super().__init__()
        self.b, self.c, self.e = (nn.Parameter(torch.tensor(v)) for v in (0.7, 0.5, -0.3))
        self.s, self.sigma, self.size, self.widen = 0.5, 0.4, size, widen
        self.double()

    def encode(self, images):
        return (images.flatten(1) - 0.5,)

    def start(self, num):
        return num, []

    def group(self, state, evidence=None):
        num, chosen = state
        zero = torch.zeros(num, self.size, dtype=torch.float64)
        one = torch.ones_like(zero)
        if not chosen:
            prior, slope, noise = Normal(zero, one), self.c * self.b + self.e, self._noise_of_z1()
            offset, context, widen = zero, None, self.widen
        else:
            prior, slope, noise = Normal(self.b * chosen[0], self.s * one), self.c, self.sigma
            offset, context, widen = self.e * chosen[0], chosen[0], 1.0
        posterior = None
        if evidence is not None:  # y = slope z + offset + noise, with z ~ prior
            precision = prior.scale**-2 + (slope / noise) ** 2
            pull = prior.loc * prior.scale**-2 + slope / noise**2 * (evidence[0] - offset)
            posterior = Normal(pull / precision, widen * precision**-0.5)
        return Group(prior, posterior, context)

    def advance(self, state, z):
        return state[0], [*state[1], z]

    def emit(self, state):
        z1, z2 = state[1]
        mean = (0.5 + self.c * z2 + self.e * z1)[:, None, None]
        return GaussianEmission(mean, torch.tensor(self.sigma, dtype=torch.float64))

    def _noise_of_z1(self):
        return (self.sigma**2 + (self.c * self.s) ** 2) ** 0.5

    def log_evidence(self, images):
        """The exact log p(x), (n,)."""
        spread = ((self.c * self.b + self.e) ** 2 + self._noise_of_z1() ** 2) ** 0.5
        return TorchNormal(0.5, spread).log_prob(images).flatten(1).sum(1).detach()


class ExactFlat(FlatVAE):
    """z ~ N(0, I), x ~ N(0.5 + c z, sigma^2), with the exact posterior; float64."""

    def __init__(self, size=2, c=0.3, sigma=0.1):
        variance = 1 / (1 + (c / sigma) ** 2)

        class Encoder(nn.Module):
            def forward(self, images):
                loc = variance * c / sigma**2 * (images.flatten(1) - 0.5)
                return loc, torch.full_like(loc, 0.5 * math.log(variance))

        class Decoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.c = nn.Parameter(torch.tensor(c))

            def forward(self, z):
                return 0.5 + self.c * z[:, None, None]

        super().__init__(Encoder(), Decoder(), Gaussian(sigma), size, posterior_scale="log_scale")
        self.spread = math.hypot(c, sigma)
        self.double()
        self.decoder.c.data.fill_(c)
        self.likelihood.log_scale.fill_(math.log(sigma))

    def log_evidence(self, images):
        return TorchNormal(0.5, self.spread).log_prob(images).flatten(1).sum(1)


def standard_normal(size):
    """N(0, I) in float64."""
    return StandardNormal(size).double()


def interrupt_at(vae, step, action):
    """Call `action` when `vae` begins its walk number `step`; training walks once a step."""
    begin, seen = vae.start, []

    def start(num):
        seen.append(num)
        if len(seen) == step:
            action()
        return begin(num)

    vae.start = start
    return vae
