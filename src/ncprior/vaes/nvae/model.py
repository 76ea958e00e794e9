"""NVAE: a VAE whose latents come in a long chain of groups, coarse pictures before fine ones.

Written from the paper and from facts about the published checkpoints, which it can read (see
`checkpoint.py`); it shares no code with the published program.

Reference: Vahdat and Kautz, NVAE: A Deep Hierarchical Variational Autoencoder (NeurIPS 2020).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ncprior.normal import bounded_normal
from ncprior.vaes.likelihoods import (
    Bernoulli,
    DiscretizedLogisticMixture,
    Gaussian,
    PixelNormal,
    quantised,
)
from ncprior.vaes.nvae.cells import DecoderCell, EncoderCell
from ncprior.vaes.nvae.flows import Flow, FlowedNormal
from ncprior.vaes.nvae.layers import MaskedConv2d, NormedConv2d, recomputed
from ncprior.walk import Evidence, Group

TOWER_EXPANSION, POST_EXPANSION = 6, 3


class NVAEState(NamedTuple):
    """Decoder features s(z_<k) (n, c, h, w), from which group k is drawn, and k."""

    features: Tensor
    chosen: int


class EncoderGroup(nn.Module):
    """What the encoder does for one group, and how its features x meet the decoder's s."""

    def __init__(self, down: EncoderCell | None, cells: Iterable[EncoderCell]) -> None:
        super().__init__()
        self.down, self.cells = down, nn.ModuleList(cells)
        self.combine: NormedConv2d | None = None  # none for the coarsest group

    def path(self) -> list[nn.Module]:
        """The cells on the way to this group's features."""
        return [*([self.down] if self.down else []), *self.cells]

    def meet(self, x: Tensor, s: Tensor) -> Tensor:
        assert self.combine is not None
        return x + self.combine(s)


class DecoderGroup(nn.Module):
    """Cells that lead to group k (none for the first), and what takes z_k in."""

    def __init__(
        self, up: DecoderCell | None, cells: Iterable[DecoderCell], combine: NormedConv2d
    ) -> None:
        super().__init__()
        self.up, self.cells = up, nn.ModuleList(cells)
        self.combine = combine

    def path(self) -> list[nn.Module]:
        """The cells on the way to this group."""
        return [*([self.up] if self.up else []), *self.cells]

    def take_in(self, s: Tensor, z: Tensor) -> Tensor:
        return self.combine(torch.cat([s, z], 1))


class NVAE(nn.Module):
    """A hierarchical VAE with residual cells, offering the walk.

    Latents of the coarsest scale come first. Sides halve `num_blocks` times before the finest
    latents and once more for each further scale; channels double with each halving.

    Args:
        image_shape: (c, h, w) of the images outside.
        groups_per_scale: Groups of each scale, *finest first*, as NVAE's settings list them.
        latent_channels: Channels of z in every group.
        encoder_channels: Channels at full resolution in the encoder.
        decoder_channels: The same in the decoder.
        num_blocks: Halvings before the finest latents, and doublings after them.
        pre_cells: Cells per halving, the last of which halves.
        post_cells: Cells per doubling, the first of which doubles.
        encoder_cells: Cells per group in the encoder.
        decoder_cells: Cells per group in the decoder.
        squeeze_excitation: Whether cells gate their channels.
        residual_posterior: The encoder says how the posterior differs from the prior, not what it
            is.
        num_flows: Pairs of autoregressive flow cells that each posterior goes through. With any,
            log q is quickly known at its own draws only.
        likelihood: "bernoulli", "discretized_logistic_mixture" (RGB), "normal" (a density of
            2x - 1 whose scales are learned per pixel) or "gaussian" (a density of x of one scale).
        likelihood_scale: That scale, the standard deviation in pixels of [0, 1].
        num_mixtures: Components of the logistic mixture.
        num_bits: Bit depth to which images of 8 bits are cut, for pixels that are not binary.
        padding: Zeros put around images inside; 2 for MNIST, whose 28 pixels become 32.
        checkpoint_activations: In training compute each cell again in the backward pass instead
            of keeping what is inside it: less memory for a third more time.

    Raises:
        ValueError: sizes that cannot work; for image sides the message names some that do.
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        *,
        groups_per_scale: Sequence[int] = (5,),
        latent_channels: int = 20,
        encoder_channels: int = 32,
        decoder_channels: int = 32,
        num_blocks: int = 1,
        pre_cells: int = 2,
        post_cells: int = 2,
        encoder_cells: int = 2,
        decoder_cells: int = 2,
        squeeze_excitation: bool = True,
        residual_posterior: bool = True,
        num_flows: int = 0,
        likelihood: str = "bernoulli",
        likelihood_scale: float = 0.1,
        num_mixtures: int = 10,
        num_bits: int = 8,
        padding: int = 0,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "image_shape": [int(side) for side in image_shape],
            "groups_per_scale": [int(groups) for groups in groups_per_scale],
            "latent_channels": latent_channels,
            "encoder_channels": encoder_channels,
            "decoder_channels": decoder_channels,
            "num_blocks": num_blocks,
            "pre_cells": pre_cells,
            "post_cells": post_cells,
            "encoder_cells": encoder_cells,
            "decoder_cells": decoder_cells,
            "squeeze_excitation": squeeze_excitation,
            "residual_posterior": residual_posterior,
            "num_flows": num_flows,
            "likelihood": likelihood,
            "likelihood_scale": likelihood_scale,
            "num_mixtures": num_mixtures,
            "num_bits": num_bits,
            "padding": padding,
            "checkpoint_activations": checkpoint_activations,
        }
        _check(self.config)
        channels, height, width = self.config["image_shape"]
        self.image_shape = (channels, height, width)
        self.padded_shape = (channels, height + 2 * padding, width + 2 * padding)
        self.latent_channels, self.padding = latent_channels, padding
        self.residual_posterior = residual_posterior
        self.num_bits = 8 if likelihood == "bernoulli" else num_bits
        self.checkpoint_activations = checkpoint_activations
        self.groups_per_scale = tuple(self.config["groups_per_scale"])
        self.num_groups = sum(self.groups_per_scale)
        se = squeeze_excitation

        # Scale 0 is the finest here; its channels are those at full resolution times 2^num_blocks.
        scales = range(len(self.groups_per_scale))
        scale_of = [s for s in scales for _ in range(self.groups_per_scale[s])]  # finest first
        down_by = [2 ** (num_blocks + s) for s in scales]
        wide = [decoder_channels * factor for factor in down_by]
        coarsest = (height + 2 * padding) // down_by[-1], (width + 2 * padding) // down_by[-1]
        self.latent_shapes = [  # of each group, in the order of the walk
            (latent_channels, coarsest[0] * 2**up, coarsest[1] * 2**up)
            for up in (scales[-1] - s for s in reversed(scale_of))
        ]

        # Modules stand in the order of the published checkpoints.
        self.prior_features = nn.Parameter(torch.randn(wide[-1], *coarsest))
        self.stem = NormedConv2d(channels, encoder_channels, 3)
        self.pre = nn.ModuleList(
            EncoderCell(encoder_channels * 2**block, down=i == pre_cells - 1, squeeze_excitation=se)
            for block in range(num_blocks)
            for i in range(pre_cells)
        )
        self.encoder = nn.ModuleList()  # finest group first
        for i, s in enumerate(scale_of):
            now = encoder_channels * down_by[s]
            first = i > 0 and s != scale_of[i - 1]
            group = EncoderGroup(
                EncoderCell(now // 2, down=True, squeeze_excitation=se) if first else None,
                [EncoderCell(now, squeeze_excitation=se) for _ in range(encoder_cells)],
            )
            if i < len(scale_of) - 1:
                group.combine = NormedConv2d(wide[s], now, 1)
            self.encoder.append(group)
        self.top = NormedConv2d(encoder_channels * down_by[-1], encoder_channels * down_by[-1], 1)

        chain = scale_of[::-1]  # scale of each group in the order of the walk
        both = 2 * latent_channels
        self.posterior_heads = nn.ModuleList(
            NormedConv2d(encoder_channels * down_by[s], both, 3) for s in chain
        )
        self.prior_heads = nn.ModuleList(NormedConv2d(wide[s], both, 1) for s in chain[1:])
        self.flows = nn.ModuleList(Flow(latent_channels, num_flows) for _ in chain if num_flows)
        self.decoder = nn.ModuleList()
        for k, s in enumerate(chain):
            finer = k > 0 and s != chain[k - 1]
            cell = partial(DecoderCell, expansion=TOWER_EXPANSION, squeeze_excitation=se)
            self.decoder.append(
                DecoderGroup(
                    cell(2 * wide[s], up=True) if finer else None,
                    [cell(wide[s]) for _ in range(decoder_cells if k else 0)],
                    NormedConv2d(wide[s] + latent_channels, wide[s], 1),
                )
            )
        self.post = nn.ModuleList(
            DecoderCell(
                wide[0] // 2 ** (block + (i > 0)),
                up=i == 0,
                expansion=POST_EXPANSION,
                squeeze_excitation=se,
            )
            for block in range(num_blocks)
            for i in range(post_cells)
        )
        self.likelihood, outputs = _likelihood(self.config)
        self.image_head = NormedConv2d(decoder_channels, outputs, 3)

    def encode(self, images: Tensor) -> Evidence:
        """The encoder's features for each group in the order of the walk, each (n, c, h, w).

        Images (n, c, h, w) in [0, 1] may have the padding already.
        """
        x = self.stem(2 * self._prepared(images) - 1)
        x = self._through(self.pre, x)
        evidence = []
        for group in self.encoder:
            assert isinstance(group, EncoderGroup)
            x = self._through(group.path(), x)
            evidence.append(x)
        evidence[-1] = F.elu(self.top(F.elu(x)))
        return tuple(reversed(evidence))

    def start(self, num: int) -> NVAEState:
        return NVAEState(self.prior_features.expand(num, -1, -1, -1), 0)

    def group(self, state: NVAEState, evidence: Evidence | None = None) -> Group:
        """Group k: prior and posterior over z (n, *latent_shapes[k]).

        The context is s(z_<k), of which the prior is made; none for the first group, whose prior
        is N(0, 1.01^2).
        """
        s, k = state
        if k >= self.num_groups:
            raise ValueError(f"all {self.num_groups} groups are chosen; call emit")
        loc: Tensor
        if k == 0:
            loc = log_scale = s.new_zeros(()).expand(len(s), *self.latent_shapes[0])
        else:
            loc, log_scale = self.prior_heads[k - 1](F.elu(s)).chunk(2, 1)
        prior = bounded_normal(loc, log_scale)
        context = s if k else None
        if evidence is None:
            return Group(prior, None, context)
        x = evidence[k]
        if k:
            place = self.encoder[self.num_groups - 1 - k]
            assert isinstance(place, EncoderGroup)
            x = place.meet(x, s)
        q_loc, q_log_scale = self.posterior_heads[k](x).chunk(2, 1)
        if self.residual_posterior:
            q_loc, q_log_scale = loc + q_loc, log_scale + q_log_scale
        posterior = bounded_normal(q_loc, q_log_scale)
        if not self.flows:
            return Group(prior, posterior, context)
        flow = self.flows[k]
        assert isinstance(flow, Flow)
        return Group(prior, FlowedNormal(posterior, flow), context)

    def advance(self, state: NVAEState, z: Tensor) -> NVAEState:
        """Take z_k in and go through the decoder's cells up to group k + 1."""
        s, k = state
        group = self.decoder[k]
        assert isinstance(group, DecoderGroup)
        s = group.take_in(s, z)
        if k + 1 < self.num_groups:
            group = self.decoder[k + 1]
            assert isinstance(group, DecoderGroup)
            s = self._through(group.path(), s)
        return NVAEState(s, k + 1)

    def emit(self, state: NVAEState) -> Any:
        """The likelihood p(x | z) of images (n, c, h, w), without padding."""
        if state.chosen < self.num_groups:
            raise ValueError(
                f"emit needs all {self.num_groups} groups, got {state.chosen}; advance the state"
            )
        outputs = self.image_head(F.elu(self._through(self.post, state.features)))
        if self.padding:
            inside = slice(self.padding, -self.padding)
            outputs = outputs[:, :, inside, inside]
        if getattr(self.likelihood, "squash", False):
            outputs = outputs.sigmoid()
        return self.likelihood(outputs)

    def convolution_weights(self) -> list[Tensor]:
        """The weights that convolutions use, (out, in, kernel, kernel), in the modules' order.

        Weight norm and masks are applied, and gradients flow: NVAE's spectral regulariser sums
        their norms.
        """
        weights = []
        for module in self.modules():
            if isinstance(module, NormedConv2d | MaskedConv2d):
                weights.append(module.effective_weight())
            elif isinstance(module, nn.Conv2d):
                weights.append(module.weight)
        return weights

    def batch_norms(self) -> list[nn.BatchNorm2d]:
        """All batch-norm layers, in the modules' order."""
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def _prepared(self, images: Tensor) -> Tensor:
        """Images at the model's bit depth and with its padding."""
        shape = tuple(images.shape[1:])
        if shape not in (self.image_shape, self.padded_shape):
            also = f" or {self.padded_shape}" if self.padding else ""
            raise ValueError(f"images must have shape {self.image_shape}{also}, got {shape}")
        images = quantised(images, self.num_bits)
        return images if shape == self.padded_shape else F.pad(images, [self.padding] * 4)

    def _through(self, cells: Iterable[nn.Module], x: Tensor) -> Tensor:
        again = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for cell in cells:
            x = recomputed(cell, x) if again else cell(x)
        return x


def _likelihood(config: dict[str, Any]) -> tuple[nn.Module, int]:
    """The likelihood and how many values it needs per pixel."""
    name, channels = config["likelihood"], config["image_shape"][0]
    if name == "bernoulli":
        return Bernoulli(), channels
    if name == "normal":
        return PixelNormal(), 2 * channels
    if name == "gaussian":
        return Gaussian(config["likelihood_scale"]), channels
    if channels != 3:
        raise ValueError(
            f"discretized_logistic_mixture is for images of 3 channels, got {channels}; use "
            'likelihood = "normal" or "bernoulli"'
        )
    mixtures = config["num_mixtures"]
    return DiscretizedLogisticMixture(mixtures, config["num_bits"]), 10 * mixtures


def _check(config: dict[str, Any]) -> None:
    """See that sizes are positive and that the image can be halved as often as they ask."""
    likelihoods = ("bernoulli", "discretized_logistic_mixture", "normal", "gaussian")
    if config["likelihood"] not in likelihoods:
        raise ValueError(
            f"likelihood must be one of {', '.join(likelihoods)}, got {config['likelihood']!r}"
        )
    if len(config["image_shape"]) != 3 or min(config["image_shape"]) < 1:
        raise ValueError(f"image_shape must be (c, h, w), got {tuple(config['image_shape'])}")
    groups = config["groups_per_scale"]
    if not groups or min(groups) < 1:
        raise ValueError(f"groups_per_scale must be positive numbers, finest first, got {groups}")
    least = {"num_blocks": 0, "num_flows": 0, "padding": 0, "encoder_cells": 0, "decoder_cells": 0}
    sizes = ("latent_channels", "encoder_channels", "decoder_channels", "pre_cells", "post_cells")
    for name, smallest in (least | dict.fromkeys((*sizes, "num_mixtures"), 1)).items():
        if config[name] < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {config[name]}")
    if not 1 <= config["num_bits"] <= 8:
        raise ValueError(f"num_bits must be between 1 and 8, got {config['num_bits']}")
    halvings = config["num_blocks"] + len(groups) - 1
    factor, padding = 2**halvings, config["padding"]
    for side in config["image_shape"][1:]:
        if (side + 2 * padding) % factor:
            low = (side + 2 * padding) // factor * factor - 2 * padding
            fitting = [str(size) for size in (low, low + factor) if size > 0]
            raise ValueError(
                f"{config['num_blocks']} blocks and {len(groups)} scales halve images {halvings} "
                f"times, so that their sides plus twice the padding of {padding} must be "
                f"divisible by {factor}; got {side}. Sides of {' or '.join(fitting)} fit, and so "
                f"may another padding"
            )
