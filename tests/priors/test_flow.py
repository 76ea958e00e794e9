import subprocess
import sys

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from ncprior.priors import Codes, FlowPrior
from ncprior.priors.fitting import first_weights
from ncprior.priors.flow import FAMILIES


@pytest.fixture(params=FAMILIES)
def flow(request):
    """A flow that is far from the identity, on latents far from unit scale."""
    with first_weights(3):
        prior = FlowPrior(3, family=request.param, transforms=2, hidden=(16,)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.3 * noise)
    prior.loc.copy_(torch.tensor([1.0, -2.0, 0.5]))
    prior.spread.copy_(torch.tensor([0.2, 3.0, 1.0]))
    return prior.eval().requires_grad_(False)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_prob_is_the_change_of_variables(flow, temperature, rng):
    """log N(T(z); 0, t^2 I) + log |det dT/dz|, the Jacobian by automatic differentiation."""
    z = flow.sample((5,), generator=rng)
    prior = flow.tempered(temperature)

    def transform(point):
        return flow.flow.transform()((point - flow.loc) / flow.spread)

    for point, found in zip(z, prior.log_prob(z), strict=True):
        jacobian = torch.autograd.functional.jacobian(transform, point)
        normal = Normal(0.0, temperature).log_prob(transform(point)).sum()
        # A spline's slope is a quotient of small differences, which costs it half of its digits.
        expected = normal + jacobian.slogdet().logabsdet
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_samples_are_noise_pushed_through_the_inverse(flow):
    z = flow.tempered(0.5).sample((6,), generator=torch.Generator().manual_seed(4))
    noise = torch.randn(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    back = flow.flow.transform()((z - flow.loc) / flow.spread)
    torch.testing.assert_close(back, 0.5 * noise, rtol=1e-6, atol=1e-6)


def test_temperatures_multiply(flow, rng):
    z = flow.sample((4,), generator=rng)
    twice = flow.tempered(0.5).tempered(0.8)
    torch.testing.assert_close(twice.log_prob(z), flow.tempered(0.4).log_prob(z))
    assert flow.tempered(1.0) is flow and flow.temperature == 1


def test_finds_a_correlated_normal(rng):
    """Affine couplings hold N(m, S) exactly; what is left of KL is the fit's error."""
    cholesky = torch.tensor([[1.0, 0.0], [0.9, 0.4]])
    loc = torch.randn(4000, 2, generator=rng) @ cholesky.T + 3
    codes = Codes(loc, torch.zeros_like(loc))
    prior = FlowPrior.fit(codes, family="maf", transforms=1, hidden=(16,), steps=600,
                          learning_rate=0.01)  # fmt: skip
    truth = MultivariateNormal(torch.full((2,), 3.0), scale_tril=cholesky)
    z = truth.sample((4000,))
    # 5 parameters on 3600 codes cost 5 / 7200 nats; the rest is the optimiser's.
    assert float((truth.log_prob(z) - prior.log_prob(z)).mean()) < 0.01


def test_one_latent(rng):
    for family in FAMILIES:
        with first_weights(0):
            prior = FlowPrior(1, family=family)
        z = prior.sample((4,), generator=rng)
        assert z.shape == (4, 1) and prior.log_prob(z).shape == (4,)


def test_unknown_family():
    with pytest.raises(ValueError, match="family must be one of realnvp, nsf, maf, got 'glow'"):
        FlowPrior(2, family="glow")


def test_without_zuko(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ModuleNotFoundError, match=r"ncprior\[flows\]"):
        FlowPrior(2)


def test_zuko_changes_no_torch_default():
    code = """
from torch.distributions import Distribution
before = Distribution._validate_args
from ncprior.priors import FlowPrior
FlowPrior(2)
assert Distribution._validate_args is before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
