"""A log-ratio that also sees what the frozen VAE makes of z: decoded, and encoded again.

A latent from a hole decodes to what is no image, and the encoder does not find it again: that is
hard to tell from z alone, and the VAE knows it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.normal import Normal, StandardNormal
from ncprior.ratios.network import RatioNetwork
from ncprior.walk import device_of, evaluating

ROWS = 512  # that go through the VAE at a time
BENT_AT = 100.0  # nats; sums over latents are bent from there on, since far off they are huge


def reencode(vae: Any, z: Tensor) -> tuple[Tensor, Normal]:
    """The decoder's mean images (n, c, h, w) of z (n, d), in [0, 1], and their posteriors (n,).

    Raises:
        ValueError: a VAE with several latent groups, or whose posterior is not normal.
    """
    check_reencodable(vae)
    start = vae.start(len(z))
    images = vae.emit(vae.advance(start, z)).mean.clamp(0, 1)
    posterior = vae.group(start, vae.encode(images)).posterior
    if not isinstance(posterior, Normal):
        raise ValueError(
            f"reencode needs a normal posterior, got {type(posterior).__name__}; fit without it"
        )
    return images, posterior


def check_reencodable(vae: Any) -> None:
    """Raise ValueError for a VAE with several latent groups."""
    if vae.num_groups != 1:
        raise ValueError(
            f"reencode needs a VAE with one latent group, this one has {vae.num_groups}; fit "
            "without it"
        )


def features(vae: Any, z: Tensor) -> Tensor:
    """What a network sees of z (n, d), (n, 3 d + 5 + h).

    z, how far the mean of its image's posterior lies from it, the logarithms of that posterior's
    scales, five sums, and h hidden units of the decoder if it has a method `hidden`, which maps z
    to (n, h). The sums: log q(z | image) / N(z; 0, I), |z|^2, the squared distance of z from the
    posterior in its scales, the posterior's KL from N(0, I), and the greyness of the image.
    """
    images, q = reencode(vae, z)
    off = (z - q.loc) / q.scale
    sums = [
        _bent(q.log_prob(z) - StandardNormal(z.shape[-1]).log_prob(z)),
        z.square().sum(-1),
        _bent(off.square().sum(-1)),
        0.5 * (q.loc.square() + q.scale.square() - 1).sum(-1) - q.scale.log().sum(-1),
        (images * (1 - images)).flatten(1).sum(-1),
    ]
    hidden = getattr(getattr(vae, "decoder", None), "hidden", None)
    inside = [] if hidden is None else [hidden(z)]
    return torch.cat([z, q.loc - z, q.scale.log(), torch.stack(sums, -1), *inside], -1)


def view_of(vae: Any) -> Callable[[Tensor], Tensor]:
    """A function from z (n, d) to its `features`, some rows at a time."""
    return lambda z: torch.cat([features(vae, rows) for rows in z.split(ROWS)])


def _bent(x: Tensor) -> Tensor:
    return x / (1 + x.abs() / BENT_AT)


class ReencodedRatio(nn.Module):
    """log r(z) = network(features(z)), the features being those of a frozen VAE.

    The VAE is no part of the module and is not saved with it: `attach` says which it is.

    Args:
        network: Of `features`, without a context.
        latent_size: d.
        vae: The VAE that it was fitted on, if it is at hand.
    """

    context_shape = None

    def __init__(self, network: RatioNetwork, latent_size: int, vae: Any = None) -> None:
        super().__init__()
        self.network = network
        self.latent_shape = (latent_size,)
        self._attached = (vae,)  # a tuple, so that its weights are not taken for the ratio's

    def attach(self, vae: Any) -> None:
        """Say which VAE to look through; it is not changed."""
        check_reencodable(vae)
        self._attached = (vae,)

    @property
    def attached(self) -> bool:
        return self._attached[0] is not None

    @property
    def config(self) -> dict[str, Any]:
        (size,) = self.latent_shape
        return {"network": "reencoded", "latent_size": size, "of": self.network.config}

    @property
    def temperature(self) -> Tensor:
        return self.network.temperature

    @property
    def chunk(self) -> int:
        """Proposals to weigh at a time."""
        return min(self.network.chunk, ROWS)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """log r in nats at z (n, d), (n,).

        Raises:
            ValueError: no VAE is attached.
        """
        (vae,) = self._attached
        if vae is None:
            raise ValueError(
                "this ratio looks at decoded latents and needs the VAE that it was fitted on: "
                "load the prior with from_pretrained(..., vae=vae) or call prior.under(vae) first"
            )
        if device_of(vae) != z.device:
            vae.to(z.device)
        slope = torch.is_grad_enabled() and z.requires_grad  # of z, never of the VAE's weights
        with evaluating(vae), torch.set_grad_enabled(slope):
            seen = view_of(vae)(z.to(_dtype_of(vae)))
        found: Tensor = self.network(seen.to(self.temperature.dtype))
        return found.to(z.dtype)


def _dtype_of(vae: Any) -> torch.dtype:
    return next((p.dtype for p in vae.parameters()), torch.get_default_dtype())
