"""Image likelihoods p(x | z): modules that turn a decoder's output into a density of images.

Each emission has `mean` (n, c, h, w) in [0, 1], `log_prob(images)` (n,) in nats and
`sample(generator=)`.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ncprior.normal import Normal, bounded_normal


def _sum_of_logs(numbers: Tensor) -> Tensor:
    """Sum over the last dimension of the logarithms of numbers in [1/2, 1], which are overwritten.

    Halves are multiplied with each other first, since a logarithm takes far longer than a product,
    six times at most: 64 factors do not underflow.
    """
    for _ in range(6):
        half, odd = divmod(numbers.shape[-1], 2)
        if odd:
            break
        numbers = numbers[..., :half].mul_(numbers[..., half:])
    return numbers.log().sum(-1)


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

    def log_prob_of_copies(self, images: Tensor) -> Tensor:
        """log_prob for j images, each of which every j-th row of the logits is for, (n / j, j).

        With logits l it is the sum of (x - 1/2) l - |l| / 2 + log sigmoid(|l|); no copy of the
        images is made. There is no gradient.
        """
        logits = self.logits.detach().flatten(1)
        logits = logits.unflatten(0, (-1, len(images)))  # (copies, j, pixels)
        products = logits * (images.flatten(1) - 0.5)
        signed = products.sum(-1)
        size = torch.abs(logits, out=products)  # fresh memory takes longer than the arithmetic
        return signed - 0.5 * size.sum(-1) + _sum_of_logs(size.sigmoid_())

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


@dataclass(frozen=True)
class PixelNormalEmission:
    """Independent normal values 2x - 1, given means and scales (n, c, h, w) on that axis."""

    normal: Normal

    @property
    def mean(self) -> Tensor:
        return (0.5 * self.normal.loc + 0.5).clamp(0, 1)

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-density of 2x - 1 in nats, (n,); that of x is larger by log(2) per value."""
        return self.normal.log_prob(2 * images - 1)

    def sample(self, *, generator: Generator | None = None, temperature: float = 1.0) -> Tensor:
        drawn = self.normal.tempered(temperature).sample(generator=generator)
        return (0.5 * drawn + 0.5).clamp(0, 1)


@dataclass(frozen=True)
class LogisticMixtureEmission:
    """RGB values from mixtures of M logistics, integrated over the bin around each value.

    Inside, values are on [-1, 1]. The mean of green is shifted by red and that of blue by both, so
    that the colours of a pixel depend on each other.

    Reference: Salimans et al. (PixelCNN++, ICLR 2017), section 2.1 and 2.2. As in NVAE, the open
    upper bin takes all values above 0.99 (254 and 255 of 8 bits).
    """

    weights: Tensor  # (n, M, h, w), logits
    means: Tensor  # (n, 3, M, h, w)
    log_scales: Tensor  # (n, 3, M, h, w), at least -7
    coefficients: Tensor  # (n, 3, M, h, w): red on green, red on blue, green on blue
    num_bits: int

    @property
    def mean(self) -> Tensor:
        """Approximately: mean parameters of the mixture, each colour given the mean before it."""
        probs = self.weights.softmax(1)[:, None]
        means = (probs * self.means).sum(2)
        return self._chain(means, (probs * self.coefficients).sum(2))

    def log_prob(self, images: Tensor) -> Tensor:
        """Log-probability in nats, (n,), of values that are multiples of 1 / (2^bits - 1)."""
        x = (2 * quantised(images, self.num_bits) - 1)[:, :, None]  # (n, 3, 1, h, w)
        red, green = x[:, 0], x[:, 1]
        first, second, third = self.coefficients.unbind(1)
        shift = torch.stack([0 * first, first * red, second * red + third * green], 1)
        per_value = self._log_bin(x, self.means + shift)  # (n, 3, M, h, w)
        per_pixel = (per_value.sum(1) + self.weights.log_softmax(1)).logsumexp(1)
        return per_pixel.flatten(1).sum(1)

    def sample(self, *, generator: Generator | None = None, temperature: float = 1.0) -> Tensor:
        """Images (n, 3, h, w) in [0, 1], not rounded to bins.

        As in NVAE, the temperature divides the logits of the mixture and also the scales: below 1
        the components are fewer but the noise is wider.
        """
        tensor = self.weights
        shapes = (tensor.shape, (len(tensor), 3, *tensor.shape[2:]))
        mixture, logistic = (
            torch.rand(shape, generator=generator, device=tensor.device, dtype=tensor.dtype)
            for shape in shapes
        )
        return self.draw(
            1e-5 + (1 - 2e-5) * mixture, 1e-5 + (1 - 2e-5) * logistic, temperature=temperature
        )

    def draw(self, mixture: Tensor, logistic: Tensor, *, temperature: float = 1.0) -> Tensor:
        """The images that uniform noise (n, M, h, w) and (n, 3, h, w) stands for."""
        gumbel = -(-mixture.log()).log()
        pick = (self.weights / temperature + gumbel).argmax(1)[:, None, None]  # (n, 1, 1, h, w)
        pick = pick.expand(-1, 3, -1, -1, -1)
        means, log_scales, coefficients = (
            of_all.gather(2, pick)[:, :, 0]
            for of_all in (self.means, self.log_scales, self.coefficients)
        )
        noise = log_scales.exp() / temperature * logistic.logit()
        return self._chain(means + noise, coefficients)

    def _chain(self, values: Tensor, coefficients: Tensor) -> Tensor:
        """Values (n, 3, h, w) shifted by the colours before them, clamped one by one; in [0, 1]."""
        first, second, third = coefficients.unbind(1)
        red = values[:, 0].clamp(-1, 1)
        green = (values[:, 1] + first * red).clamp(-1, 1)
        blue = (values[:, 2] + second * red + third * green).clamp(-1, 1)
        return 0.5 * torch.stack([red, green, blue], 1) + 0.5

    def _log_bin(self, x: Tensor, means: Tensor) -> Tensor:
        """Log-probability of the bin around x under each logistic.

        The probability is sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper)). Where it is
        below 1e-5 it is taken as density times width, as published.
        """
        width = 2 / (2**self.num_bits - 1)
        inverse = (-self.log_scales).exp()
        middle = inverse * (x - means)
        upper, lower = middle + 0.5 * width * inverse, middle - 0.5 * width * inverse
        below, above = F.logsigmoid(upper), F.logsigmoid(-lower)
        inside = below + above + (-torch.expm1(-width * inverse)).log()
        density = middle - self.log_scales - 2 * F.softplus(middle) + math.log(width)
        inside = torch.where(inside > math.log(1e-5), inside, density)
        return torch.where(x < -0.999, below, torch.where(x > 0.99, above, inside))


def quantised(images: Tensor, num_bits: int) -> Tensor:
    """Images of 8 bits with the low bits cut off: integers below 2^bits, divided by the largest.

    What has the bit depth already stays as it is.
    """
    if num_bits == 8:
        return images
    levels = (images * 255).round().div(2 ** (8 - num_bits), rounding_mode="floor")
    return levels / (2**num_bits - 1)


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


class PixelNormal(nn.Module):
    """Normal values 2x - 1; the decoder gives their means and log-scales, (n, 2 * c, h, w).

    Both are bounded softly as NVAE's latents are. This is the decoder of the base models of the
    paper on noise contrastive priors.
    """

    outputs_per_pixel = 2
    squash = False

    def forward(self, outputs: Tensor) -> PixelNormalEmission:
        loc, log_scale = outputs.chunk(2, 1)
        return PixelNormalEmission(bounded_normal(loc, log_scale))


class DiscretizedLogisticMixture(nn.Module):
    """RGB values of 2^bits levels; the decoder gives (n, 10 * M, h, w).

    First the M logits of the mixture, then for each colour M means, log-scales and coefficients.

    Args:
        num_mixtures: M.
        num_bits: 8, or fewer, to which images are cut.
    """

    squash = False

    def __init__(self, num_mixtures: int = 10, num_bits: int = 8) -> None:
        super().__init__()
        if num_mixtures < 1:
            raise ValueError(f"num_mixtures must be at least 1, got {num_mixtures}")
        if not 1 <= num_bits <= 8:
            raise ValueError(f"num_bits must be between 1 and 8, got {num_bits}")
        self.num_mixtures, self.num_bits = num_mixtures, num_bits

    def forward(self, outputs: Tensor) -> LogisticMixtureEmission:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        weights, rest = outputs[:, : self.num_mixtures], outputs[:, self.num_mixtures :]
        means, log_scales, raw = rest.unflatten(1, (3, 3, self.num_mixtures)).unbind(2)
        return LogisticMixtureEmission(
            weights, means, log_scales.clamp_min(-7), raw.tanh(), self.num_bits
        )


LIKELIHOODS: dict[str, type[nn.Module]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "categorical": Categorical,
}
