"""Sizes of published NVAEs and of two small ones, as keyword arguments of `NVAE`.

Groups are listed finest scale first, as in the published commands. A name that ends in "-normal"
has the Normal decoder of the base models of the papers on noise contrastive priors and on VAEBM.
"""

from typing import Any

# All published models have 20 latent channels, 2 cells per group, gates and residual posteriors,
# which are the defaults of `NVAE`.
_MIXTURE: dict[str, Any] = dict(likelihood="discretized_logistic_mixture")
_CELEBA64: dict[str, Any] = dict(num_blocks=1, num_flows=1) | _MIXTURE

_COLOUR: dict[str, dict[str, Any]] = {
    # Published settings of NVAE.
    "nvae-cifar10": dict(
        groups_per_scale=(30,), encoder_channels=128, decoder_channels=128, num_flows=1
    )
    | _MIXTURE,
    "nvae-celeba64": dict(groups_per_scale=(20, 10, 5), encoder_channels=64, decoder_channels=64)
    | _CELEBA64,
    # VAEBM's command for CelebA-64 (15 groups). For 30 and 6 groups, the other two of the ablation
    # of NCP-VAE, only the number of groups is known; the rest is taken from that command.
    "nvae-celeba64-30": dict(
        groups_per_scale=(10, 10, 10), encoder_channels=48, decoder_channels=48
    )
    | _CELEBA64,
    "nvae-celeba64-15": dict(groups_per_scale=(5, 5, 5), encoder_channels=48, decoder_channels=48)
    | _CELEBA64,
    "nvae-celeba64-6": dict(groups_per_scale=(2, 2, 2), encoder_channels=48, decoder_channels=48)
    | _CELEBA64,
    # Published settings of NVAE.
    "nvae-celebahq256": dict(
        groups_per_scale=(16, 8, 4, 4, 4),
        encoder_channels=30,
        decoder_channels=30,
        num_flows=2,
        num_bits=5,
    )
    | _MIXTURE,
}

PRESETS: dict[str, dict[str, Any]] = {
    # 8x8 digits: 5 groups of 4 x 4x4.
    "nvae-digits": dict(
        groups_per_scale=(5,),
        latent_channels=4,
        encoder_channels=8,
        decoder_channels=8,
        pre_cells=1,
        post_cells=1,
        encoder_cells=1,
        decoder_cells=1,
        likelihood="gaussian",
        likelihood_scale=0.1,
    ),
    # MNIST on a CPU: 6 groups of 8 x 4x4.
    "nvae-tiny": dict(
        groups_per_scale=(6,),
        latent_channels=8,
        encoder_channels=4,
        decoder_channels=4,
        num_blocks=3,
        pre_cells=1,
        post_cells=1,
        encoder_cells=1,
        decoder_cells=1,
        padding=2,
    ),
    # Published settings of NVAE.
    "nvae-mnist": dict(
        groups_per_scale=(10, 5), num_blocks=2, pre_cells=3, post_cells=3, padding=2
    ),
    # The base of NCP-VAE on MNIST: "10 groups of 4x4 latents". Its widths were not published; these
    # are those of "nvae-mnist".
    "nvae-mnist-small": dict(
        groups_per_scale=(10,), num_blocks=3, pre_cells=3, post_cells=3, padding=2
    ),
    **_COLOUR,
    **{f"{name}-normal": sizes | dict(likelihood="normal") for name, sizes in _COLOUR.items()},
    # VAEBM's command for CelebA-HQ-256, whose 20 groups are those of NCP-VAE.
    "nvae-celebahq256-normal": dict(
        groups_per_scale=(4, 4, 4, 4, 4),
        encoder_channels=32,
        decoder_channels=32,
        num_flows=2,
        num_bits=5,
        likelihood="normal",
    ),
}
