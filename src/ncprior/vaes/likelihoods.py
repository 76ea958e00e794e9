"""Image likelihoods p(x | z): modules that turn a decoder's output into a density of images.

Each emission has `mean` (n, c, h, w) in [0, 1], `log_prob(images)` (n,) in nats and
`sample(generator=)`.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ncprior.normal import Normal


@dataclass(frozen=True)
class BernoulliEmission:
    """Independent binary pixels, given logits (n, c, h, w)."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        return self.logits.sigmoid()

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-probability in nats, (n,); exact for 0 and 1, the usual cross-entropy between."""
        cross_entropy = F.binary_cross_entropy_with_logits(
            self.logits, images.expand_as(self.logits), reduction="none"
        )
        return -cross_entropy.flatten(1).sum(1)

    def sample(self, *, generator: Generator | None = None) -> Tensor:
        uniform = torch.rand(self.logits.shape, generator=generator, device=self.logits.device)
        return (uniform < self.mean).to(self.logits.dtype)


@dataclass(frozen=True)
class GaussianEmission:
    """Independent normal pixels, given means and scales (n, c, h, w); a density."""

    mean: Tensor
    scale: Tensor

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density in nats, (n,)."""
        return self._normal().log_prob(images)

    def sample(self, *, generator: Generator | None = None) -> Tensor:
        return self._normal().sample(generator=generator)

    def _normal(self) -> Normal:
        return Normal(self.mean, self.scale.expand_as(self.mean), event_dim=3)


@dataclass(frozen=True)
class CategoricalEmission:
    """Pixels that take one of L evenly spaced values in [0, 1], given logits (n, L, c, h, w)."""

    logits: Tensor

    @property
    def mean(self) -> Tensor:
        levels = self.logits.shape[1]
        values = torch.linspace(0, 1, levels, device=self.logits.device, dtype=self.logits.dtype)
        return torch.einsum("nlchw,l->nchw", self.logits.softmax(1), values)

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-probability in nats, (n,); each pixel counts as the nearest of the L values."""
        targets = (images * (self.logits.shape[1] - 1)).round().long()
        return -F.cross_entropy(self.logits, targets, reduction="none").flatten(1).sum(1)

    def sample(self, *, generator: Generator | None = None) -> Tensor:
        levels = self.logits.shape[1]
        exponential = torch.empty_like(self.logits).exponential_(generator=generator)
        picks = (self.logits - exponential.log()).argmax(1)  # Gumbel-max
        return picks.to(self.logits.dtype) / (levels - 1)


class Bernoulli(nn.Module):
    """Binary pixels; the decoder gives logits (n, c, h, w)."""

    outputs_per_pixel = 1
    squash = False  # whether a built-in decoder should end in a sigmoid

    def forward(self, outputs: Tensor) -> BernoulliEmission:
        return BernoulliEmission(outputs)


class Gaussian(nn.Module):
    """Normal pixels around the decoder's output (n, c, h, w), with one scale for all of them.

    Args:
        scale: Standard deviation in pixels of [0, 1].
        learned: Train log(scale) with the VAE instead of holding it fixed.
    """

    outputs_per_pixel = 1
    squash = True
    log_scale: Tensor

    def __init__(self, scale: float = 0.1, *, learned: bool = False) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        log_scale = torch.tensor(float(scale)).log()
        if learned:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    def forward(self, outputs: Tensor) -> GaussianEmission:
        return GaussianEmission(outputs, self.log_scale.exp())


class Categorical(nn.Module):
    """Pixels in L evenly spaced values; the decoder gives logits (n, L * c, h, w)."""

    squash = False

    def __init__(self, levels: int = 256) -> None:
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels must be at least 2, got {levels}")
        self.outputs_per_pixel = levels

    def forward(self, outputs: Tensor) -> CategoricalEmission:
        return CategoricalEmission(outputs.unflatten(1, (self.outputs_per_pixel, -1)))


LIKELIHOODS: dict[str, type[nn.Module]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
}
