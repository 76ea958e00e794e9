import math

import pytest
import torch

import ncprior
from ncprior.vaes import PRESETS
from ncprior.vaes.networks import ACTIVATIONS
from ncprior.vaes.nvae import PRESETS as NVAE_PRESETS
from ncprior.walk import from_posterior, walk


def through(vae, images):
    """The emission of one walk along the posterior."""
    walked = walk(
        vae, from_posterior(torch.Generator().manual_seed(0)), len(images), vae.encode(images)
    )
    return vae.emit(walked.state)


@pytest.fixture(autouse=True)
def seeded_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize(
    ("preset", "shape", "n"),
    [("digits", (1, 8, 8), 3), ("lars-mnist", (1, 28, 28), 3), ("rae-celeba64", (3, 64, 64), 1)],
)
def test_presets(preset, shape, n):
    vae = ncprior.build_vae(shape, preset=preset).eval()
    images = torch.rand(n, *shape)
    with torch.no_grad():
        emission = through(vae, images)
    assert emission.mean.shape == images.shape
    assert emission.log_prob(images).isfinite().all()
    assert emission.mean.min() >= 0 and emission.mean.max() <= 1
    assert vae.latent_size == PRESETS[preset]["latent_size"]


def test_every_preset_is_tested():
    flat = {name for name in PRESETS if not name.startswith("nvae-")}
    assert flat == {"digits", "lars-mnist", "rae-celeba64"}
    assert {name for name in PRESETS if name.startswith("nvae-")} == set(NVAE_PRESETS)


def test_nvae_by_preset_and_by_network():
    """The mean image, which every recipe's run hands over, is for MLPs and changes nothing here."""
    vae = ncprior.build_vae(
        (1, 8, 8), preset="nvae-digits", num_flows=1, image_mean=torch.full((1, 8, 8), 0.3)
    )
    assert isinstance(vae, ncprior.NVAE) and vae.num_groups == 5 and len(vae.flows) == 5
    again = ncprior.build_vae(network="nvae", **vae.config)
    assert again.config == vae.config
    with torch.no_grad():
        emission = through(vae.eval(), torch.rand(2, 1, 8, 8))
    assert emission.mean.shape == (2, 1, 8, 8)
    with pytest.raises(TypeError, match="latent_size"):
        ncprior.build_vae((1, 8, 8), preset="nvae-digits", latent_size=3)


def test_widths_of_the_published_networks():
    lars = ncprior.build_vae((1, 28, 28), preset="lars-mnist")
    sizes = [p.shape for p in lars.encoder.layers.parameters() if p.ndim == 2]
    assert sizes == [(300, 784), (300, 300), (100, 300)]
    rae = ncprior.build_vae((3, 64, 64), preset="rae-celeba64", channels=(4, 8, 16, 32))
    assert rae.decoder.stem.out_features == 8 * 8 * 32  # RAE: 8 x 8 x its widest, 1024
    assert rae.encoder.head.in_features == 4 * 4 * 32


LIKELIHOODS = [("bernoulli", {}), ("gaussian", {"likelihood_learned": True})]
LIKELIHOODS += [("categorical", {"levels": 5})]


@pytest.mark.parametrize(("likelihood", "options"), LIKELIHOODS, ids=[n for n, _ in LIKELIHOODS])
@pytest.mark.parametrize("network", ["mlp", "conv"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20)])
def test_shapes(network, likelihood, options, shape):
    small = {"latent_size": 2, "hidden": (7, 5), "channels": (3, 4), "kernel": 3}
    vae = ncprior.build_vae(shape, network=network, likelihood=likelihood, **small, **options)
    emission = through(vae, torch.rand(2, *shape))
    assert emission.mean.shape == (2, *shape)
    assert emission.log_prob(torch.rand(2, *shape)).shape == (2,)
    assert emission.sample(generator=torch.Generator()).shape == (2, *shape)


@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
@pytest.mark.parametrize("sides", [(8, 8), (4, 12)])
def test_odd_kernels(kernel, sides):
    vae = ncprior.build_vae((1, *sides), network="conv", channels=(3, 4, 5), kernel=kernel)
    assert through(vae, torch.rand(2, 1, *sides)).mean.shape == (2, 1, *sides)


@pytest.mark.parametrize("kernel", [2, 4])
def test_even_kernels_are_refused(kernel):
    with pytest.raises(ValueError, match="kernel"):
        ncprior.build_vae((1, 8, 8), network="conv", channels=(3, 4), kernel=kernel)


@pytest.mark.parametrize("sides", [(28, 30), (9, 8), (7, 7)])
def test_odd_sizes_are_refused(sides):
    message = rf"divisible by 4, got {sides[0]}x{sides[1]}; use fewer widths or another image_size"
    with pytest.raises(ValueError, match=message):
        ncprior.build_vae((1, *sides), network="conv", channels=(2, 2, 2))


def test_odd_sizes_suit_fewer_widths():
    vae = ncprior.build_vae((1, 7, 9), network="conv", channels=(2,), kernel=3)
    assert through(vae, torch.rand(2, 1, 7, 9)).mean.shape == (2, 1, 7, 9)


def test_options_change_a_preset():
    vae = ncprior.build_vae((1, 8, 8), preset="digits", latent_size=3)
    assert vae.latent_size == 3
    assert vae.likelihood.log_scale.exp().item() == pytest.approx(0.1)


def test_config_builds_the_same_again():
    vae = ncprior.build_vae((1, 8, 8), preset="digits", likelihood="categorical", levels=3)
    again = ncprior.build_vae(**vae.config)
    again.load_state_dict(vae.state_dict())
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(through(again, images).mean, through(vae, images).mean)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_centred_decoder_starts_at_the_mean_image(likelihood, activation):
    """At z = 0 exactly: hidden layers without biases give 0 there."""
    mean = torch.linspace(0, 1, 64).view(1, 8, 8)
    vae = ncprior.build_vae(
        (1, 8, 8), likelihood=likelihood, activation=activation, image_mean=mean
    )
    start = vae.likelihood(vae.decoder(torch.zeros(1, vae.latent_size))).mean[0]
    torch.testing.assert_close(start, mean.clamp(1e-4, 1 - 1e-4))
    assert not vae.encoder(mean[None]).any()


def test_centring_does_not_touch_a_convolution():
    options = {"network": "conv", "channels": (2, 2), "kernel": 3}
    vae = ncprior.build_vae((1, 8, 8), **options, image_mean=torch.full((1, 8, 8), 0.3))
    assert through(vae, torch.rand(2, 1, 8, 8)).mean.shape == (2, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "digit"}, "preset must be one of digits, lars-mnist, rae-celeba64"),
        ({"network": "unet"}, 'network must be "mlp", "conv" or "nvae"'),
        ({"likelihood": "normal"}, "likelihood must be one of bernoulli, gaussian, categorical"),
        ({"latent_size": 0}, "latent_size must be at least 1"),
        ({"activation": "elu"}, "activation must be one of tanh, relu, silu, gelu"),
        ({"posterior_scale": "exp"}, "posterior_scale must be one of"),
        ({"likelihood": "gaussian", "likelihood_scale": math.nan}, "scale must be positive"),
    ],
)
def test_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ncprior.build_vae((1, 8, 8), **options)


def test_misspelt_option():
    with pytest.raises(TypeError, match="latentsize"):
        ncprior.build_vae((1, 8, 8), latentsize=3)


def test_tanh_without_a_graph_is_tanh(rng):
    x = torch.cat([8 * torch.randn(1000, generator=rng), torch.tensor([0.0, -100, 100])])
    with torch.no_grad():
        found = ACTIVATIONS["tanh"]()(x.clone())
        half = ACTIVATIONS["tanh"]()(x.bfloat16())
    torch.testing.assert_close(found, x.tanh(), rtol=0, atol=2e-7)
    torch.testing.assert_close(half, x.bfloat16().tanh(), rtol=0, atol=0)
    with_graph = x.clone().requires_grad_()
    ACTIVATIONS["tanh"]()(with_graph).sum().backward()
    torch.testing.assert_close(with_graph.grad, 1 - x.tanh().square())
