import math

import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal
from toys import gaussian_images, linear_vae

from ncprior import train_vae
from ncprior.priors import Codes, PseudoInputs, VampPrior
from ncprior.priors.vamp import Components


def parts(scale=0.5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    means = 3 * torch.randn(6, 4, generator=generator, dtype=dtype)
    scales = scale * (0.5 + torch.rand(6, 4, generator=generator, dtype=dtype))
    return Components(torch.linspace(0, 2, 6, dtype=dtype).log_softmax(0), means, scales)


@pytest.fixture
def vae():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return linear_vae()


@pytest.fixture
def images(rng):
    return gaussian_images(300, rng)


@pytest.mark.parametrize("scale", [0.5, 1e-4])
def test_log_prob_is_that_of_torch(scale, rng):
    some = parts(scale)
    expected = MixtureSameFamily(
        Categorical(logits=some.log_weights), Independent(Normal(some.means, some.scales), 1)
    )
    z = some.sample((5, 3), generator=rng)
    torch.testing.assert_close(some.log_prob(z), expected.log_prob(z), rtol=1e-7, atol=1e-6)


def test_single_precision_survives_narrow_posteriors(rng):
    """Scales of 1e-3 at distances of 3: multiplied out in float32 it would be off by 0.1."""
    some = parts(1e-3, torch.float32)
    z = some.sample((100,), generator=rng)
    exact = Components(*(t.double() for t in some)).log_prob(z.double())
    assert some.log_prob(z).dtype == torch.float32
    torch.testing.assert_close(some.log_prob(z).double(), exact, rtol=1e-5, atol=1e-5)


def test_all_images_as_pseudo_inputs_are_q(vae, images, rng):
    """Without noise, the prior whose pseudo-inputs are all images is the aggregate posterior."""
    prior = PseudoInputs(vae.encode, images, components=300, noise=0.0).eval()
    loc, scale = vae.encode(images)
    q = Components(torch.full((300,), -math.log(300)), loc, scale)
    z = q.sample((50,), generator=rng)
    torch.testing.assert_close(prior.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(prior.frozen().log_prob(z), q.log_prob(z))


def test_one_component_ends_at_the_mean_of_the_codes(vae, images):
    """E_q log N(z; m(u), t^2) is greatest where m(u) is the mean of q: a closed form."""
    codes = Codes(*vae.encode(images))
    vae.encoder.gain = nn.Parameter(torch.tensor(vae.encoder.gain))  # an encoder that could change
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    prior = VampPrior.fit(
        codes, vae=vae, images=images, components=1, steps=400, learning_rate=0.02, seed=0
    )
    rest, _ = codes.split(0.1, seed=0)
    # The best of the held-out losses is measured on 30 draws: their mean is off by 0.6 / sqrt(30),
    # and that of the 270 others by 0.6 / sqrt(270).
    assert ((prior.means[0] - rest.loc.mean(0)).abs() < 4 * 0.6 / math.sqrt(30)).all()
    torch.testing.assert_close(prior.scales[0], codes.scale[0])
    for name, value in vae.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in vae.parameters())


def test_fit_gains_on_its_start(vae, images, rng):
    """Few pseudo-inputs, moved, explain q better than the images that they started from."""
    codes = Codes(*vae.encode(images))
    settings = {"vae": vae, "images": images, "components": 5}
    fitted = VampPrior.fit(codes, **settings, steps=300)
    start = PseudoInputs(vae.encode, images, components=5).frozen()
    z = codes.draw(4000, generator=rng)
    gain = fitted.log_prob(z) - start.log_prob(z)
    assert gain.mean() > 4 * gain.std() / math.sqrt(4000)
    weighted = VampPrior.fit(codes, **settings, steps=300, weighted=True)
    assert weighted.log_weights.std() > 0.01
    assert weighted.log_weights.exp().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(fitted.log_weights.exp(), torch.full((5,), 0.2))


def test_trained_with_the_vae(vae, images, rng):
    """The VAE's own optimiser moves the pseudo-inputs; what is left needs no encoder."""
    vae.prior = PseudoInputs(vae.encode, images, components=20)
    start = vae.prior.inputs.detach().clone()
    train_vae(vae, images, steps=30, batch_size=50, learning_rate=0.01, progress=False,
              tensorboard=False, device="cpu")  # fmt: skip
    moved = vae.prior.inputs.detach()
    assert (moved - start).abs().mean() > 0.01
    frozen = vae.prior.frozen()
    z = torch.randn(7, 2, generator=rng)
    torch.testing.assert_close(frozen.log_prob(z), vae.prior.eval().log_prob(z).detach())
    assert not any(True for _ in frozen.parameters())
    assert vae.with_prior(frozen).group(vae.start(3)).prior.sample(generator=rng).shape == (3, 2)


def test_pseudo_inputs_stay_images(vae, images):
    prior = PseudoInputs(vae.encode, images, components=4)
    with torch.no_grad():
        prior.inputs.add_(5)
    assert prior.train().parts.means.shape == (4, 2)
    assert prior.inputs.max() == 1


def test_temperature_scales_each_component(rng):
    prior = VampPrior.of(parts())
    assert prior.tempered(1.0) is prior
    cold = prior.tempered(0.25)
    torch.testing.assert_close(cold.scales, 0.25 * prior.scales)
    torch.testing.assert_close(cold.means, prior.means)


def test_what_cannot_be_fitted(vae, images):
    codes = Codes(*vae.encode(images))
    with pytest.raises(ValueError, match="pass vae= and images="):
        VampPrior.fit(codes, vae=None, images=None)
    with pytest.raises(ValueError, match="n of at least components = 301"):
        VampPrior.fit(codes, vae=vae, images=images, components=301)
    with pytest.raises(ValueError, match=r"floats in \[0, 1\]"):
        VampPrior.fit(codes, vae=vae, images=255 * images, components=3)
