"""Whether a VAE is wrapped as it was trained, told from a few of its images."""

import math
from typing import Any

import torch
from torch import Tensor

from ncprior.normal import Normal
from ncprior.numerics import stream
from ncprior.vaes.flat import POSTERIOR_SCALES, FlatVAE
from ncprior.walk import Group, device_of, evaluating, walk

IMAGES = 50
"""As many images are looked at, at most."""
CLEARLY = 5.0
"""Standard errors by which another reading of the encoder must be better, and nats beside."""
WALK = ("num_groups", "encode", "start", "group", "advance", "emit")


def check_vae(vae: Any, images: Tensor) -> list[str]:
    """Decode posterior means of a few images, and say what looks wrong.

    A decoder that gives probabilities where the likelihood takes logits, or an encoder whose scale
    is read in another way than it was trained in, raises no error anywhere: samples are merely
    poor, and priors are fitted to the wrong posterior.

    Args:
        vae: Any VAE that offers the walk.
        images: Images (n, c, h, w) in [0, 1] as it was trained on; the first 50 are used.

    Returns:
        What a user should look into, in words; empty if all is well.

    Raises:
        ValueError: a VAE that cannot encode and decode these images, or gives NaN.
    """
    missing = [name for name in WALK if not hasattr(vae, name)]
    if missing:
        raise ValueError(
            f"vae must offer the walk of ncprior.walk, a {type(vae).__name__} has no "
            f"{', '.join(missing)}; wrap your networks: "
            "ncprior.FlatVAE(encoder, decoder, ncprior.Gaussian(scale=0.1), latent_size=16)"
        )
    images = images[:IMAGES].to(device_of(vae))
    shape = f"{'x'.join(map(str, images.shape[1:]))}"
    generator = stream(0, "check", device=device_of(vae))

    def center(_: int, group: Group) -> Tensor:
        q = group.posterior
        assert q is not None
        return q.loc if isinstance(q, Normal) else q.sample(generator=generator)

    with torch.no_grad(), evaluating(vae):
        try:
            evidence = vae.encode(images)
            decoded = vae.emit(walk(vae, center, len(images), evidence).state).mean
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            first = str(error).splitlines()[0]
            raise ValueError(
                f"the VAE cannot encode and decode images of {shape}: {type(error).__name__}: "
                f"{first}. Are these the images that it was trained on?"
            ) from error
        if decoded.shape != images.shape:
            raise ValueError(
                f"decoder and likelihood must give images {tuple(images.shape)} for these, got "
                f"{tuple(decoded.shape)}; let the decoder end in an Unflatten"
            )
        if not decoded.isfinite().all():
            raise ValueError(
                "the VAE decodes posterior means of its images to NaN or infinity; check its "
                "weights, and posterior_scale"
            )
        return [*_unlike(images, decoded), *_other_scale(vae, images)]


def _unlike(images: Tensor, decoded: Tensor) -> list[str]:
    """Whether reconstructions are any nearer to the images than what they have in common."""
    error = float((decoded - images).square().mean().sqrt())
    of_mean = float((images.mean(0) - images).square().mean().sqrt())
    if len(images) < 2 or error < of_mean:
        return []
    return [
        "Reconstructions are no nearer to the images than their mean image is (off by "
        f"{error:.3f} against {of_mean:.3f} of a pixel's range): no prior can help. Either the VAE "
        "has learned nothing, or it is wrapped in another way than it was trained: Bernoulli() "
        "takes logits, the encoder must give mean and scale in this order, and images lie in "
        "[0, 1]."
    ]


def _other_scale(vae: Any, images: Tensor) -> list[str]:
    """Whether the ELBO is far better under another reading of the encoder's raw scale."""
    if not isinstance(vae, FlatVAE) or vae.deterministic or len(images) < 2:
        return []
    prior = vae.prior
    if getattr(prior, "slow_density", False) or not hasattr(prior, "log_prob"):
        return []
    own = vae.posterior_scale
    each = {scale: _elbos(vae, images, scale) for scale in POSTERIOR_SCALES}
    gains = {scale: elbos - each[own] for scale, elbos in each.items() if scale != own}
    best = max(gains, key=lambda scale: float(gains[scale].nan_to_num(-math.inf).mean()))
    gain = gains[best]
    won, se = float(gain.mean()), float(gain.std()) / math.sqrt(len(gain))
    if not won > CLEARLY * max(se, 1.0):
        return []
    return [
        f"With posterior_scale={best!r} instead of {own!r} the ELBO of {len(images)} images is "
        f"{won:.0f} ± {se:.0f} nats higher: was the encoder trained with that, or with a small "
        "weight of the KL?"
    ]


def _elbos(vae: FlatVAE, images: Tensor, scale: str) -> Tensor:
    """The ELBO of each image from one draw, the same noise for all readings, (n,) in nats."""
    read = vae.with_prior(vae.prior)
    read.posterior_scale = scale
    loc, spread = read.encode(images)
    generator = stream(0, "check", device=loc.device)
    z = loc + spread * torch.randn(loc.shape, generator=generator, device=loc.device).to(loc)
    log_x = vae.likelihood(vae.decoder(z)).log_prob(images)
    return (log_x + vae.prior.log_prob(z) - Normal(loc, spread).log_prob(z)).double()
