import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from ncprior.priors import AutoregressivePrior, Codes
from ncprior.priors.fitting import first_weights


@pytest.fixture(params=[(1, (8,)), (2, (3,)), (5, (16, 7, 12))], ids=["1", "2", "5"])
def prior(request):
    """Some sizes, the last with fewer and more units than one per degree; weights at random."""
    size, hidden = request.param
    with first_weights(1):
        prior = AutoregressivePrior(size, hidden=hidden, components=3).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in prior.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data.add_(0.5 * noise)
    prior.loc.fill_(0.7)
    prior.spread.fill_(2.5)
    return prior.eval().requires_grad_(False)


def test_each_coordinate_sees_those_before_it_and_no_other(prior, rng):
    x = torch.randn(prior.latent_size, generator=rng, dtype=torch.float64)
    for parameters in prior.conditional(x):
        assert parameters.shape == (prior.latent_size, 3)
    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda x, k=k: prior.conditional(x)[k], x)
        seen = jacobian.abs().sum(1) > 0  # (d, d): does i see j
        before = torch.ones(prior.latent_size, prior.latent_size).tril(-1) > 0
        assert torch.equal(seen, before)


def test_log_prob_is_the_sum_of_torch_mixtures(prior, rng):
    z = prior.sample((4,), generator=rng)
    x = (z - 0.7) / 2.5
    found = prior.conditional(x)
    each = MixtureSameFamily(
        Categorical(logits=found.log_weights), Normal(found.means, found.scales)
    ).log_prob(x)
    shift = prior.latent_size * torch.tensor(2.5, dtype=torch.float64).log()
    torch.testing.assert_close(prior.log_prob(z), each.sum(-1) - shift)


def test_samples_are_those_of_the_plain_loop(prior):
    """Each unit computed once gives what d passes of the whole network give."""
    n, size = 50, prior.latent_size
    z = prior.sample((n,), generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    uniform = torch.rand(n, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(n, size, generator=generator, dtype=torch.float64)
    x = torch.zeros(n, size, dtype=torch.float64)
    for i in range(size):
        found = prior.conditional(x)
        edges = found.log_weights[:, i].exp().cumsum(-1)
        pick = torch.searchsorted(edges, uniform[:, i : i + 1].contiguous(), right=True).clamp_max(
            2
        )
        mean, scale = (t[:, i].gather(1, pick)[:, 0] for t in (found.means, found.scales))
        x[:, i] = mean + scale * noise[:, i]
    torch.testing.assert_close(z, 2.5 * x + 0.7)


def test_finds_a_known_chain(rng):
    """z_1 with two peaks, z_2 around z_1^2: both conditionals are within reach."""
    n = 6000
    truth_1 = MixtureSameFamily(
        Categorical(torch.tensor([0.3, 0.7])),
        Normal(torch.tensor([-1.0, 1.5]), torch.tensor([0.2, 0.4])),
    )
    peak = (torch.rand(n, generator=rng) < 0.7).long()
    noise = torch.randn(n, 2, generator=rng)
    z1 = torch.tensor([-1.0, 1.5])[peak] + torch.tensor([0.2, 0.4])[peak] * noise[:, 0]
    z = torch.stack([z1, z1.square() + 0.3 * noise[:, 1]], 1)
    train, test = z[:4000], z[4000:]
    prior = AutoregressivePrior.fit(
        Codes(train, torch.zeros_like(train)), hidden=(64,), components=4, steps=800,
        learning_rate=5e-3,
    )  # fmt: skip
    exact = truth_1.log_prob(test[:, 0]) + Normal(test[:, 0].square(), 0.3).log_prob(test[:, 1])
    # Some 50 effective parameters on 3600 codes cost 50 / 7200 nats, and the optimiser has a part.
    assert float((exact - prior.log_prob(test)).mean()) < 0.05


@pytest.mark.parametrize("bad", [{"components": 0}, {"hidden": ()}, {"hidden": (4, 0)}])
def test_settings_out_of_range(bad):
    with pytest.raises(ValueError, match="components and hidden must be at least 1"):
        AutoregressivePrior(3, **bad)
