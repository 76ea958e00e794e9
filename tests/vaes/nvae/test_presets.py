import functools

import pytest
import torch

import ncprior
from ncprior.vaes.nvae import PRESETS
from ncprior.vaes.nvae.checkpoint import aliases, published_names

SHAPES = {
    "digits": (1, 8, 8),
    "tiny": (1, 28, 28),
    "mnist": (1, 28, 28),
    "cifar10": (3, 32, 32),
    "celeba64": (3, 64, 64),
    "celebahq256": (3, 256, 256),
}


@functools.cache
def without_memory(preset, **options):
    with torch.device("meta"):
        return ncprior.build_vae(SHAPES[preset.split("-")[1]], preset=preset, **options)


@pytest.mark.parametrize(
    ("preset", "millions", "coarsest"),
    [
        ("nvae-mnist", 33.4, 4),
        ("nvae-cifar10", 130.9, 16),
    ],
)
def test_parameters_of_published_models(preset, millions, coarsest):
    vae = without_memory(preset)
    assert round(sum(p.numel() for p in vae.parameters()) / 1e6, 1) == millions
    assert vae.latent_shapes[0] == (20, coarsest, coarsest)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "millions", "coarsest"),
    [
        ("nvae-cifar10-normal", 130.7, 16),
        ("nvae-celeba64", 153.3, 8),
        ("nvae-celeba64-15-normal", 65.0, 8),
        ("nvae-celebahq256", 330.8, 8),
        ("nvae-celebahq256-normal", 365.4, 8),
    ],
)
def test_parameters_of_large_published_models(preset, millions, coarsest):
    test_parameters_of_published_models(preset, millions, coarsest)


@pytest.mark.parametrize(
    ("preset", "keys", "twice"), [("nvae-mnist", 2016, 105), ("nvae-cifar10", 3838, 180)]
)
def test_keys_of_published_checkpoints(preset, keys, twice):
    vae = without_memory(preset)
    names = published_names(vae)
    assert list(names) == list(vae.state_dict()) and len(set(names.values())) == len(names)
    assert len(aliases(vae)) == twice
    assert len(names) + len(aliases(vae)) == keys


@pytest.mark.parametrize(
    ("preset", "groups", "latents"),
    [
        ("nvae-digits", 5, (4, 4, 4)),
        ("nvae-tiny", 6, (8, 4, 4)),
        ("nvae-mnist-small", 10, (20, 4, 4)),
        ("nvae-celeba64-6", 6, (20, 8, 8)),
    ],
)
def test_groups(preset, groups, latents):
    vae = without_memory(preset)
    assert vae.num_groups == groups and vae.latent_shapes[0] == latents


def test_normal_is_also_an_option():
    assert without_memory("nvae-celeba64-6", likelihood="normal").config == (
        without_memory("nvae-celeba64-6-normal").config
    )
    colour = {name for name in PRESETS if "celeba" in name or "cifar" in name}
    assert {f"{name}-normal" for name in colour if not name.endswith("-normal")} <= colour


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_suits_its_images(preset):
    """Without building it: the sizes that `NVAE` checks first."""
    from ncprior.vaes.nvae.model import _check

    few = {name: 1 for name in ("pre_cells", "post_cells", "num_mixtures")}
    sizes = few | dict(latent_channels=20, num_blocks=1, padding=0, num_bits=8, num_flows=0)
    sizes |= dict(encoder_channels=32, decoder_channels=32, encoder_cells=1, decoder_cells=1)
    shape = SHAPES[preset.split("-")[1]]
    _check(sizes | {"likelihood": "bernoulli"} | PRESETS[preset] | {"image_shape": shape})
