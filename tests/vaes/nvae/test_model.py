import math

import pytest
import torch

import ncprior
from ncprior.metrics import importance_weighted_bounds
from ncprior.normal import Normal
from ncprior.vaes import NVAE
from ncprior.vaes.nvae.flows import FlowedNormal
from ncprior.walk import evaluating, from_posterior, from_prior, walk

SMALL = {
    "groups_per_scale": (2, 1),
    "latent_channels": 3,
    "encoder_channels": 4,
    "decoder_channels": 6,
    "pre_cells": 1,
    "post_cells": 1,
    "encoder_cells": 1,
    "decoder_cells": 1,
}
COLOUR = {"likelihood": "discretized_logistic_mixture", "num_mixtures": 2}


def small(shape=(1, 8, 8), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return NVAE(shape, **SMALL | options)


VARIANTS = [
    ((1, 8, 8), {}),
    ((1, 12, 20), {}),
    ((1, 6, 6), {"padding": 1}),
    ((3, 8, 8), COLOUR | {"num_flows": 2}),
    ((3, 8, 8), COLOUR | {"num_bits": 5}),
    ((2, 8, 8), {"likelihood": "normal"}),
    ((3, 8, 8), {"likelihood": "normal", "num_bits": 5}),
    ((1, 8, 8), {"squeeze_excitation": False, "residual_posterior": False}),
    ((1, 16, 16), {"groups_per_scale": (1, 1, 2), "num_flows": 1, "post_cells": 2}),
    ((1, 8, 8), {"num_blocks": 0, "encoder_cells": 2, "pre_cells": 3}),
    ((1, 8, 8), {"num_blocks": 2, "encoder_cells": 0, "decoder_cells": 3}),
]


@pytest.mark.parametrize(("shape", "options"), VARIANTS)
def test_walks(shape, options, rng):
    """Shapes along both walks, a finite ELBO, and a gradient for every parameter."""
    vae, n = small(shape, **options), 3
    images = (torch.rand(n, *shape, generator=rng) * 255).round() / 255
    seen = []

    def choose(k, group):
        assert group.prior.event_shape == group.posterior.event_shape == vae.latent_shapes[k]
        assert group.prior.batch_shape == group.posterior.batch_shape == (n,)
        assert (group.context is None) == (k == 0)
        z, log_q = group.posterior.rsample_and_log_prob(generator=rng)
        seen.append(log_q - group.prior.log_prob(z))
        return z

    walked = walk(vae, choose, n, vae.encode(images))
    emission = vae.emit(walked.state)
    elbo = emission.log_prob(images) - torch.stack(seen).sum(0)
    assert elbo.shape == (n,) and elbo.isfinite().all()
    elbo.sum().backward()
    # A bias before a batch norm has a gradient of zero, and a coefficient of blue none for red.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    assert emission.mean.shape == emission.sample(generator=rng).shape == images.shape
    assert emission.mean.min() >= 0 and emission.mean.max() <= 1
    with torch.no_grad():
        drawn = vae.emit(walk(vae.eval(), from_prior(rng, 0.7), 2).state)
    assert drawn.mean.shape == (2, *shape)


def test_the_first_prior(rng):
    prior = small().group(small().start(2)).prior
    assert bool((prior.loc == 0).all()) and prior.event_dim == 3
    torch.testing.assert_close(prior.scale, torch.full_like(prior.scale, 1.01))


def test_posterior_is_flowed_only_with_flows():
    images = torch.zeros(1, 1, 8, 8)
    for vae, kind in ((small(), Normal), (small(num_flows=1), FlowedNormal)):
        assert isinstance(vae.group(vae.start(1), vae.encode(images)).posterior, kind)


def test_latents_that_are_chosen_decide(rng):
    """The picture is a function of the latents; evidence only chooses them."""
    vae = small().eval()
    images = torch.rand(2, 1, 8, 8, generator=rng)
    with torch.no_grad():
        walked = walk(vae, from_posterior(rng), 2, vae.encode(images))
        again = walk(vae, lambda k, _: walked.latents[k], 2)
    torch.testing.assert_close(vae.emit(again.state).mean, vae.emit(walked.state).mean)


def test_padding_inside_or_outside(rng):
    vae = small((1, 6, 6), padding=1).eval()
    images = torch.rand(2, 1, 6, 6, generator=rng)
    padded = torch.nn.functional.pad(images, [1] * 4)
    torch.testing.assert_close(vae.encode(images), vae.encode(padded), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"must have shape \(1, 6, 6\) or \(1, 8, 8\), got \(1, 7"):
        vae.encode(torch.zeros(2, 1, 7, 7))


def test_bits_are_cut_inside(rng):
    """Images of 8 bits, and those already cut, are one image of 5 bits."""
    vae = small((3, 8, 8), **COLOUR, num_bits=5).eval()
    eight = torch.randint(256, (2, 3, 8, 8), generator=rng)
    images, cut = eight / 255, (eight // 8) / 31
    torch.testing.assert_close(vae.encode(images), vae.encode(cut), rtol=0, atol=0)
    with torch.no_grad():
        emission = vae.emit(walk(vae, from_prior(rng), 2).state)
    torch.testing.assert_close(emission.log_prob(images), emission.log_prob(cut), rtol=0, atol=0)


def test_config_builds_the_same_again():
    vae = small(num_flows=1)
    again = NVAE(**vae.config)
    again.load_state_dict(vae.state_dict())
    assert again.config == vae.config
    assert ncprior.build_vae(network="nvae", **vae.config).config == vae.config


def test_checkpointed_training_is_the_same(rng):
    images = torch.rand(3, 1, 8, 8, generator=rng)
    found = []
    for again in (False, True):
        vae = small(checkpoint_activations=again)
        generator = torch.Generator().manual_seed(1)
        walked = walk(vae, from_posterior(generator), 3, vae.encode(images))
        vae.emit(walked.state).log_prob(images).sum().backward()
        found.append([p.grad for p in vae.parameters()] + list(vae.buffers()))
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_bfloat16_in_the_cells_only(rng):
    """Under autocast latents, densities and log-likelihoods stay in single precision."""
    vae = small((3, 8, 8), **COLOUR, num_flows=1)
    images = torch.rand(2, 3, 8, 8, generator=rng)

    def choose(_, group):
        z, log_q = group.posterior.rsample_and_log_prob(generator=rng)
        assert z.dtype == log_q.dtype == group.prior.log_prob(z).dtype == torch.float32
        return z

    with torch.autocast("cpu", torch.bfloat16):
        evidence = vae.encode(images)
        log_px = vae.emit(walk(vae, choose, 2, evidence).state).log_prob(images)
    assert evidence[1].dtype == torch.bfloat16 and log_px.dtype == torch.float32
    log_px.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.stem.parameters())


def test_regularised_tensors_are_reached():
    vae = small(num_flows=1)
    weights, norms = vae.convolution_weights(), vae.batch_norms()
    assert all(w.ndim == 4 and w.requires_grad for w in weights) and norms
    sum(w.square().sum() for w in weights).backward()
    convs = [m for m in vae.modules() if isinstance(m, torch.nn.Conv2d)]
    assert len(convs) == len(weights)
    assert all(m.weight.grad is not None for m in convs)


@pytest.mark.parametrize("flows", [0, 1])
def test_importance_weighted_bound_of_an_exact_posterior(flows, rng):
    """With log q evaluated by inversion the bound is that of the draws."""
    vae = small(num_flows=flows).eval()
    images = torch.rand(2, 1, 8, 8, generator=rng).round()
    bound = importance_weighted_bounds(
        vae, images, 1, generator=torch.Generator().manual_seed(5)
    ).base
    log_w = []
    generator = torch.Generator().manual_seed(5)

    def choose(k, group):
        z = group.posterior.sample(generator=generator)
        log_w.append(group.prior.log_prob(z) - group.posterior.log_prob(z))
        return z

    with torch.no_grad():
        walked = walk(vae, choose, 2, vae.encode(images))
        log_w.append(vae.emit(walked.state).log_prob(images))
    torch.testing.assert_close(bound, torch.stack(log_w).sum(0).double(), rtol=1e-4, atol=1e-3)


def test_training_raises_the_elbo(digits):
    """A few steps through the trainer, images being real digits."""
    data, splits = digits
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = ncprior.build_vae((1, 8, 8), preset="nvae-digits")
    options = {"device": "cpu", "progress": False, "tensorboard": False, "seed": 0}
    history = ncprior.train_vae(
        vae, data, splits, steps=20, learning_rate=5e-3, batch_size=32, evaluate_every=5, **options
    )
    assert history[-1]["validation_elbo"] > history[0]["validation_elbo"] + 5
    with evaluating(vae), torch.no_grad():
        assert vae.emit(walk(vae, from_prior(), 2).state).mean.isfinite().all()
    assert math.isfinite(history[-1]["kl"])


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 9, 8), {}, r"divisible by 4; got 9\. Sides of 8 or 12 fit"),
        (
            (1, 28, 28),
            {"num_blocks": 2, "padding": 0},
            r"divisible by 8; got 28. Sides of 24 or 32",
        ),
        ((1, 3, 8), {}, "got 3. Sides of 4 fit"),
        ((1, 8), {}, r"image_shape must be \(c, h, w\), got \(1, 8\)"),
        ((1, 8, 8), {"groups_per_scale": ()}, "groups_per_scale must be positive"),
        ((1, 8, 8), {"groups_per_scale": (3, 0)}, "groups_per_scale must be positive"),
        ((1, 8, 8), {"latent_channels": 0}, "latent_channels must be at least 1, got 0"),
        ((1, 8, 8), {"num_flows": -1}, "num_flows must be at least 0"),
        ((1, 8, 8), {"likelihood": "poisson"}, "likelihood must be one of bernoulli, "),
        ((1, 8, 8), COLOUR, "images of 3 channels, got 1"),
        ((3, 8, 8), {"num_bits": 9}, "num_bits must be between 1 and 8"),
    ],
)
def test_arguments(shape, options, message):
    with pytest.raises(ValueError, match=message):
        small(shape, **options)


def test_walk_out_of_order():
    vae = small()
    with pytest.raises(ValueError, match="emit needs all 3 groups, got 0"):
        vae.emit(vae.start(2))
    state = walk(vae, from_prior(), 2).state
    with pytest.raises(ValueError, match="all 3 groups are chosen"):
        vae.group(state)
