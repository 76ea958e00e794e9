"""Stage 2 on a two-group linear-Gaussian VAE whose q(z_k | z_<k) and p(z_k | z_<k) are known.

z1 ~ N(0, I), z2 | z1 ~ N(b z1, s^2 I) under p. Under q, z1 ~ N(M, S^2 I) and z2 | z1 ~
N(b z1 + D, (s T)^2 I), independent of x given z1: then every aggregate is in closed form.
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal as TorchNormal
from toys import SPREAD, gaussian_images, linear_vae

import ncprior
from ncprior.metrics import base_log_ratios
from ncprior.normal import Normal
from ncprior.numerics import log_z
from ncprior.training.pairs import draw_pairs
from ncprior.vaes.likelihoods import GaussianEmission
from ncprior.walk import Group, from_posterior, walk

M, S, D, T, B, SCALE, SIZE = 0.7, 0.6, 0.3, 0.5, 0.8, 0.5, 2
NOISE = 0.3  # of the posterior of z1 given x
QUIET = {"tensorboard": False, "progress": False, "device": "cpu"}
SMALL = {"steps": 500, "evaluate_every": 50, "batch_size": 128, "preset": "small"}
SMALL |= {"network_options": {"width": 32, "blocks": 2, "dropout": 0.0, "members": 4}}


class Chain(nn.Module):
    """z1 | x ~ N(M + sqrt(S^2 - n^2) u, n^2), u the standardised pixels of `gaussian_images`."""

    num_groups = 2

    def __init__(self):
        super().__init__()
        self.b = nn.Parameter(torch.tensor(B))

    def encode(self, images):
        return ((images.flatten(1) - 0.5) / SPREAD,)

    def start(self, num):
        return num, []

    def group(self, state, evidence=None):
        num, chosen = state
        one = torch.ones(num, SIZE)
        if not chosen:
            prior, context = Normal(0 * one, one), None
            posterior = evidence and Normal(
                M + math.sqrt(S**2 - NOISE**2) * evidence[0], NOISE * one
            )
        else:
            prior, context = Normal(self.b * chosen[0], SCALE * one), chosen[0]
            posterior = evidence and Normal(self.b * chosen[0] + D, SCALE * T * one)
        return Group(prior, posterior, context)

    def advance(self, state, z):
        return state[0], [*state[1], z]

    def emit(self, state):
        return GaussianEmission(state[1][1][:, None, None], torch.tensor(0.1))


def log_ratio(z, mean, spread):
    """log N(mean, spread^2 I) - log N(0, I) of z (n, d), (n,)."""
    return (TorchNormal(mean, spread).log_prob(z) - TorchNormal(0.0, 1.0).log_prob(z)).sum(-1)


EXACT = [(M, S), (D / SCALE, T)]  # q of each group in the coordinate where p is N(0, I)


def images(n, seed=1):
    return gaussian_images(n, torch.Generator().manual_seed(seed), SIZE)


@pytest.fixture(scope="module")
def fitted():
    vae = Chain()
    return vae, ncprior.fit_prior(vae, images(6000), **SMALL, **QUIET)


@pytest.fixture(scope="module")
def errors(fitted):
    """log r_k estimated less exact at draws of q, for each group."""
    vae, prior = fitted
    n = 20_000
    pairs = draw_pairs(vae, vae.encode(images(n, 5)), n, torch.Generator().manual_seed(2))
    found = []
    for ratio, pair, law in zip(prior.ratios, pairs, EXACT, strict=True):
        found.append(ratio(pair.posterior, pair.context) - log_ratio(pair.posterior, *law))
    return torch.stack(found).double()


def test_recovers_both_log_ratios(errors):
    """RMS error below 0.25 nats, as for one group; log r spreads by 0.8 and 1.1 nats."""
    assert (errors.square().mean(1).sqrt() < 0.25).all()


def test_log_z_is_that_of_the_product(fitted, errors):
    """E_p[r1 r2] = E_q[exp(e1 + e2)]: exactly 1 for the exact ratios."""
    vae, prior = fitted
    generator = torch.Generator().manual_seed(3)
    found = log_z(base_log_ratios(vae, prior, 100_000, generator=generator))
    total = errors.sum(0)
    expected = float(total.exp().mean().log())
    se = float(total.exp().std() / total.exp().mean() / len(total) ** 0.5)
    assert abs(found.value - expected) < 4 * math.hypot(found.se, se)
    assert abs(found.value) < 0.3


class Tilt(nn.Module):
    """log r(u) = a sum u: E_p[r] = exp(d a^2 / 2) where p is N(0, I) in u."""

    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, z, context=None):
        return self.a * z.sum(-1)


def test_global_log_z_in_closed_form(rng):
    """Both groups count: log Z = d (a1^2 + a2^2) / 2."""
    prior = ncprior.NoiseContrastivePrior([Tilt(0.3), Tilt(0.5)])
    found = log_z(base_log_ratios(Chain(), prior, 50_000, generator=rng, rows_at_once=7000))
    assert found.num == 50_000 and found.se < 0.01
    assert abs(found.value - SIZE * (0.3**2 + 0.5**2) / 2) < 4 * found.se


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "bias"),
    [({"sampler": "sir", "proposals": 300}, 0.03), ({"sampler": "langevin", "steps": 250}, 0.02)],
    ids=["sir", "langevin"],
)
def test_samples_follow_q(fitted, errors, sampler, bias):
    """z1 ~ N(M, S^2) and z2 - b z1 ~ N(D, (s T)^2), up to the ratios' own errors.

    To first order a tilt exp(e) moves a mean by sd(e) standard deviations and a variance by
    sd(e) sqrt(2) of itself.
    """
    vae, prior = fitted
    n = 1000
    z1, z2 = ncprior.draw(vae, prior, n, **sampler).latents
    e = errors.std(1)
    laws = [(z1, M, S, e[0]), (z2 - B * z1, D, SCALE * T, e[1])]
    for z, mean, spread, error in laws:
        assert ((z.mean(0) - mean).abs() < spread * (4 / n**0.5 + error + bias)).all()
        relative = 4 * (2 / n) ** 0.5 + 1.5 * float(error) + 2 * bias
        assert ((z.var(0) / spread**2 - 1).abs() < relative).all()


def test_only_some_groups(fitted):
    """`groups` leaves the others on their base prior: z1 ~ N(0, I), z2 | z1 as under q."""
    vae, prior = fitted
    n = 2000
    z1, z2 = ncprior.draw(vae, prior, n, groups="1", proposals=100).latents
    assert (z1.mean(0).abs() < 4 / n**0.5).all()
    residual = (z2 - B * z1).mean(0)
    assert ((residual - D).abs() < 0.1).all()
    found = ncprior.draw(vae, prior, 10, groups=[0], proposals=100)
    assert found.ess[0].isfinite().all() and found.ess[1].isnan().all()


def test_the_likelihood_uses_the_global_density(fitted):
    """Sum of log r over groups, less one log Z; the local normalisers do not enter."""
    vae, prior = fitted
    generator = torch.Generator().manual_seed(0)
    z = walk(vae, from_posterior(generator), 4, vae.encode(images(4, 7))).latents
    state, total = vae.start(4), 0
    for k in range(2):
        group = vae.group(state)
        total = total + prior.log_ratio(k, z[k], group)
        state = vae.advance(state, z[k])
    standard = (z[1] - vae.b * z[0]) / SCALE
    expected = prior.ratios[0](z[0]) + prior.ratios[1](standard, z[0])
    torch.testing.assert_close(total, expected)


def test_parts_are_the_whole(tmp_path):
    """Two groups fitted apart equal those fitted together: same draws, same weights."""
    options = SMALL | {"steps": 30, "evaluate_every": 10}
    vae, data = Chain(), images(300)
    whole = ncprior.fit_prior(vae, data, **options, **QUIET)
    parts = [ncprior.fit_prior(vae, data, groups=[k], **options, **QUIET) for k in (1, 0)]
    assert [part.fitted_groups for part in parts] == [[1], [0]]
    joined = ncprior.NoiseContrastivePrior.join(parts)
    assert joined.fitted_groups == [0, 1]
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(joined.state_dict()[name], value)
    assert joined.record["groups"][1]["loss"] == pytest.approx(whole.record["groups"][1]["loss"])
    joined.save_pretrained(tmp_path)
    parts[0].save_pretrained(tmp_path / "part")
    again = ncprior.NoiseContrastivePrior.from_pretrained(tmp_path / "part")
    assert again.fitted_groups == [1]
    with pytest.raises(ValueError, match="group 1 is in two parts"):
        ncprior.NoiseContrastivePrior.join([parts[0], whole])


def test_a_part_of_another_vae_does_not_join():
    options = SMALL | {"steps": 4, "evaluate_every": 2}
    other = Chain()
    nn.init.constant_(other.b, 0.1)
    parts = [
        ncprior.fit_prior(vae, images(100), groups=[k], **options, **QUIET)
        for k, vae in enumerate((Chain(), other))
    ]
    with pytest.raises(ValueError, match="same VAE"):
        ncprior.NoiseContrastivePrior.join(parts)


@pytest.mark.parametrize("groups", [[], [2], "1-5", "x", [-1]])
def test_groups_out_of_range(groups):
    with pytest.raises(ValueError, match="groups must"):
        ncprior.fit_prior(Chain(), images(100), groups=groups, **QUIET)


def test_one_group_by_the_walk_is_the_flat_vae(rng):
    """A one-group NVAE-like walk and a FlatVAE with the same densities fit the same prior."""

    class OneGroup(nn.Module):
        num_groups = 1

        def __init__(self, flat):
            super().__init__()
            self.encoder, self.decoder = flat.encoder, flat.decoder
            self.likelihood, self.flat = flat.likelihood, [flat]
            self.prior = flat.prior

        def encode(self, images):
            return self.flat[0].encode(images)

        def start(self, num):
            return num, None

        def group(self, state, evidence=None):
            zero = torch.zeros(state[0], 2)
            posterior = None if evidence is None else Normal(*evidence)
            return Group(Normal(zero, zero + 1), posterior, None)

        def advance(self, state, z):
            return state[0], z

        def emit(self, state):
            return self.likelihood(self.decoder(state[1]))

    flat = linear_vae()
    one = OneGroup(flat)
    data = gaussian_images(300, rng)
    options = SMALL | {"steps": 20, "evaluate_every": 10, "log_z_draws": 1000}
    a, b = (ncprior.fit_prior(vae, data, **options, **QUIET) for vae in (flat, one))
    for name, value in a.ratios.state_dict().items():
        assert torch.equal(value, b.ratios.state_dict()[name]), name
    assert a.log_z == b.log_z
    for sampler in ("sir", "langevin"):
        drawn = [
            ncprior.draw(vae, prior, 5, sampler=sampler, proposals=50, steps=10)
            for vae, prior in ((flat, a), (one, b))
        ]
        assert torch.equal(drawn[0].images, drawn[1].images)
