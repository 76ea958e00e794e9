"""VAEs from keyword arguments, with presets for the published ones."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ncprior.vaes.flat import DETERMINISTIC, FlatVAE
from ncprior.vaes.likelihoods import LIKELIHOODS
from ncprior.vaes.networks import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder
from ncprior.vaes.nvae import NVAE
from ncprior.vaes.nvae import PRESETS as NVAE_PRESETS

PRESETS: dict[str, dict[str, Any]] = {
    # The digits of scikit-learn: a narrow likelihood and 16 latents leave a real hole.
    "digits": dict(
        network="mlp",
        latent_size=16,
        hidden=(256, 256),
        activation="silu",
        likelihood="gaussian",
        likelihood_scale=0.1,
    ),
    # LARS and SNIS on MNIST (Bauer and Mnih 2019; Lawson et al. 2019).
    "lars-mnist": dict(
        network="mlp",
        latent_size=50,
        hidden=(300, 300),
        activation="tanh",
        likelihood="bernoulli",
        posterior_scale="softplus",
    ),
    # The VAE of RAE on CelebA-64 (Ghosh et al. 2020). Its loss, squared error averaged over RGB
    # plus 0.09024 KL, is that of a Gaussian likelihood of scale sqrt(1.5 * 0.09024).
    "rae-celeba64": dict(
        network="conv",
        latent_size=64,
        channels=(128, 256, 512, 1024),
        kernel=5,
        likelihood="gaussian",
        likelihood_scale=0.36792,
        posterior_scale="tanh",
    ),
    **{name: {"network": "nvae"} | sizes for name, sizes in NVAE_PRESETS.items()},
}


def build_vae(
    image_shape: Sequence[int],
    *,
    preset: str | None = None,
    image_mean: Tensor | None = None,
    **options: Any,
) -> FlatVAE | NVAE:
    """A VAE for images (c, h, w), from a preset, from options, or from a preset changed by options.

    Args:
        image_shape: (c, h, w).
        preset: A name in `PRESETS`: "digits", "lars-mnist", "rae-celeba64", "nvae-tiny", ...
        image_mean: Mean training image (c, h, w) in [0, 1], on which an MLP is centred.
        options: `network`, "mlp" or "conv" with the options of `flat_vae`, or "nvae" with those of
            `NVAE`.
    """
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    arguments = (PRESETS[preset] if preset else {}) | options
    if arguments.get("network") == "nvae":
        del arguments["network"]
        return NVAE(image_shape, **arguments)
    vae = flat_vae(image_shape, **arguments)
    vae.config = {"image_shape": list(image_shape)} | arguments
    if image_mean is not None:
        centre(vae, image_mean)
    return vae


def flat_vae(
    image_shape: Sequence[int],
    *,
    network: str = "mlp",
    latent_size: int = 16,
    hidden: Sequence[int] = (256, 256),
    activation: str = "silu",
    channels: Sequence[int] = (32, 64, 128),
    kernel: int = 5,
    likelihood: str = "bernoulli",
    likelihood_scale: float = 0.1,
    likelihood_learned: bool = False,
    levels: int = 256,
    posterior_scale: str = "softplus",
    code_scale: float = 1e-3,
) -> FlatVAE:
    """A VAE with one latent group.

    Args:
        image_shape: (c, h, w).
        network: "mlp" (uses `hidden`, `activation`) or "conv" (uses `channels`, `kernel`).
        latent_size: Number of latents d.
        hidden: Widths of the encoder's hidden layers; the decoder has them reversed.
        activation: "tanh", "relu", "silu" or "gelu".
        channels: Widths of the convolutions, finest first; sides halve at each.
        kernel: Size of the convolutions.
        likelihood: "bernoulli", "gaussian" (with `likelihood_scale`, `likelihood_learned`) or
            "categorical" (with `levels`).
        posterior_scale: See `FlatVAE`; "deterministic" makes an autoencoder, whose encoder gives a
            code and no scale.
        code_scale: See `FlatVAE`.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood must be one of {', '.join(LIKELIHOODS)}, got {likelihood!r}")
    if network not in ("mlp", "conv"):
        raise ValueError(f'network must be "mlp", "conv" or "nvae", got {network!r}')
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel must be odd, so that sides halve and double, got {kernel}")
    if latent_size < 1:
        raise ValueError(f"latent_size must be at least 1, got {latent_size}")
    by_name: dict[str, dict[str, Any]] = {
        "bernoulli": {},
        "gaussian": {"scale": likelihood_scale, "learned": likelihood_learned},
        "categorical": {"levels": levels},
    }
    emission: Any = LIKELIHOODS[likelihood](**by_name[likelihood])
    outputs = (emission.outputs_per_pixel, emission.squash)
    per_latent = 1 if posterior_scale == DETERMINISTIC else 2
    encoder: MLPEncoder | ConvEncoder
    decoder: MLPDecoder | ConvDecoder
    if network == "mlp":
        encoder = MLPEncoder(image_shape, latent_size, hidden, activation, per_latent)
        decoder = MLPDecoder(image_shape, latent_size, hidden, activation, *outputs)
    else:
        encoder = ConvEncoder(image_shape, latent_size, channels, kernel, per_latent)
        decoder = ConvDecoder(image_shape, latent_size, channels, kernel, *outputs)
    return FlatVAE(
        encoder,
        decoder,
        emission,
        latent_size,
        posterior_scale=posterior_scale,
        code_scale=code_scale,
    )


@torch.no_grad()
def centre(vae: FlatVAE, image_mean: Tensor) -> None:
    """Centre an MLP on the mean training image: its input, and its output before training."""
    mean = image_mean.flatten()
    if isinstance(vae.encoder, MLPEncoder):
        vae.encoder.image_mean.copy_(mean)
    if isinstance(vae.decoder, MLPDecoder) and vae.decoder.offset.numel() == mean.numel():
        vae.decoder.offset.copy_(mean.clamp(1e-4, 1 - 1e-4).logit())
