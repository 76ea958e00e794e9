import math

import pytest
import torch
from torch import nn
from toys import ExactFlat, TwoGroups, linear_vae, standard_normal

from ncprior import GaussianMixture, NoiseContrastivePrior
from ncprior.metrics import base_log_ratios
from ncprior.normal import StandardNormal
from ncprior.numerics import LogZ, log_z
from ncprior.ratios import MLPRatio
from ncprior.vaes import FlatVAE
from ncprior.vaes.flat import DETERMINISTIC
from ncprior.vaes.likelihoods import Gaussian


class Tilt(nn.Module):
    """log r(z) = a sum z: on N(0, I) the prior is N(a, I) and log Z = d a^2 / 2."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


def tilted(a=0.5, size=2):
    exact = LogZ(size * a**2 / 2, 0.0, math.inf, 1)
    return NoiseContrastivePrior([Tilt(a)], standard_normal(size), log_z=exact)


def test_density_is_normalised_by_log_z(rng):
    a, z = 0.5, torch.randn(6, 2, generator=rng, dtype=torch.float64)
    expected = torch.distributions.Normal(a, 1.0).log_prob(z).sum(1)
    prior = tilted(a)
    torch.testing.assert_close(prior.log_prob(z), expected)
    torch.testing.assert_close(prior.unnormalized_log_prob(z), expected + prior.log_z.value)
    assert prior.event_shape == (2,) and prior.num_groups == 1


def test_log_z_from_draws(rng):
    prior = tilted()
    vae = ExactFlat(2).with_prior(prior.base)
    found = log_z(base_log_ratios(vae, prior, 50_000, generator=rng, rows_at_once=777))
    assert found.num == 50_000
    assert abs(found.value - prior.log_z.value) < 4 * found.se


def test_log_prob_needs_log_z_and_a_base():
    z = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="needs log_z"):
        NoiseContrastivePrior([Tilt(1)], standard_normal(2)).log_prob(z)
    for prior in (NoiseContrastivePrior([Tilt(1)]), NoiseContrastivePrior([Tilt(1), Tilt(1)])):
        with pytest.raises(ValueError, match="one group and a base"):
            prior.unnormalized_log_prob(z)


def test_weight_repeats_the_context_of_its_rows(rng):
    """Row i's proposals meet row i's context, also when `draws` starts further on."""

    class Distance(nn.Module):
        def forward(self, z, context=None):
            return (z - context).square().sum(-1)

    vae = TwoGroups()
    prior = NoiseContrastivePrior([Tilt(1), Distance()])
    chosen = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    group = vae.group((5, [chosen]))
    z = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    standard = (z - vae.b * chosen[3:5, None]) / vae.s  # the base's coordinate
    expected = (standard - chosen[3:5, None]).square().sum(-1)
    torch.testing.assert_close(prior.weigher(1, group)(z, slice(3, 5)), expected)


def test_under_puts_its_base_below():
    vae, base = linear_vae(), GaussianMixture(2, 2)
    below = NoiseContrastivePrior([Tilt(1)], base).under(vae)
    assert below.prior is base and vae.prior is not base
    assert below.decoder is vae.decoder
    assert NoiseContrastivePrior([Tilt(1)]).under(vae) is vae


def test_which_base_is_another():
    """One that was saved and read again is not the same object, but the same density."""
    vae, mixture = linear_vae(), GaussianMixture(2, 2)
    twin = GaussianMixture(2, 2)
    twin.load_state_dict(mixture.state_dict())

    def other(base, vae=vae):
        return NoiseContrastivePrior([Tilt(1)], base).has_other_base(vae)

    assert other(mixture) and not other(None) and not other(StandardNormal(2))
    on_mixture = vae.with_prior(mixture)
    assert not other(mixture, on_mixture) and not other(twin, on_mixture)
    twin.means += 1
    assert other(twin, on_mixture)
    autoencoder = FlatVAE(
        nn.Identity(), nn.Identity(), Gaussian(), 2, posterior_scale=DETERMINISTIC
    )
    assert not other(mixture, autoencoder)


def test_under_refuses_another_vae():
    with pytest.raises(ValueError, match="1 groups, the VAE has 2"):
        tilted().under(TwoGroups())
    with pytest.raises(ValueError, match=r"event shape \(3,\), got \(2,\)"):
        tilted(size=2).under(ExactFlat(3))


def test_needs_a_ratio():
    with pytest.raises(ValueError, match="one module per latent group"):
        NoiseContrastivePrior([])


def test_base_belongs_to_the_module():
    """So that moving the prior to a device or dtype moves its base."""
    prior = NoiseContrastivePrior([MLPRatio(2)], GaussianMixture(2, 2)).double()
    assert prior.base.means.dtype == torch.float64
