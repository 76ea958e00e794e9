"""Objectives of autoencoders without a likelihood: WAE-MMD and the regularised ones (RAE).

Their encoder gives a code and no scale (`FlatVAE(posterior_scale="deterministic")`), and the prior
comes afterwards: a density that is fitted to the codes, and an NCP on top of it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn

from ncprior.walk import Group, walk

SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
"""Of the kernels of WAE-MMD, relative to 2 d."""


class Weights(NamedTuple):
    """Weights of an objective's penalties; None where it has no such penalty."""

    latent: float
    decoder: float | None


OBJECTIVES: dict[str, Weights] = {
    "wae-mmd": Weights(0.1, None),
    "rae-l2": Weights(1e-3, 1e-6),
    "rae-gp": Weights(1e-3, 1e-3),
    "rae-sn": Weights(1e-5, None),
}
"""Objectives by name, with the weights that they have by default."""


class Autoencoding(nn.Module):
    """Mean squared error of reconstructions, a penalty on the codes, and one on the decoder.

    The error is the mean over all values of an image, whatever the likelihood: between the image
    and the mean of p(x|z). So weights mean the same at any size of images. The penalties are

    - "wae-mmd": MMD^2 between the codes and as many draws of the prior (`imq_mmd`);
    - "rae-l2": the mean square of the codes; the sum of squares of the decoder's weights;
    - "rae-gp": the mean square of the codes; `gradient_penalty`;
    - "rae-sn": the mean square of the codes; the decoder's layers have a spectral norm of at most 1
      (`ncprior.training.spectral`), which takes no weight.

    Args:
        vae: An autoencoder: a `FlatVAE` with a deterministic encoder.
        objective: A name in `OBJECTIVES`.
        latent_weight: Weight of the penalty on codes; that in `OBJECTIVES` by default.
        decoder_weight: Weight of the penalty on the decoder, likewise.

    Raises:
        ValueError: settings that `check_objective` refuses.

    Reference: Tolstikhin et al., "Wasserstein Auto-Encoders" (ICLR 2018), Algorithm 2, with their
    program's kernel. Ghosh et al., "From Variational to Deterministic Autoencoders" (ICLR 2020),
    Eq. 11 and section 3.3. The published programs give WAE-MMD the weight 100 beside 0.05 times the
    sum of squares, which is 0.16 here for 64x64 RGB; and RAE's codes 1e-4 to 9e-3. RAE's program
    normalises the encoder too under "rae-sn", and under "rae-gp" penalises the gradient of the sum
    of the squared outputs; here both are as in the article.
    """

    followed = "error"

    def __init__(
        self,
        vae: Any,
        objective: str,
        *,
        latent_weight: float | None = None,
        decoder_weight: float | None = None,
    ) -> None:
        super().__init__()
        check_objective(objective, vae, latent_weight, decoder_weight)
        usual = OBJECTIVES[objective]
        self.vae, self.objective = vae, objective
        self.latent_weight = usual.latent if latent_weight is None else latent_weight
        self.decoder_weight = (usual.decoder or 0.0) if decoder_weight is None else decoder_weight

    def forward(
        self, images: Tensor, generator: Generator | None = None, beta: float = 1.0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its parts, the penalties weighed.

        Args:
            images: (n, c, h, w) in [0, 1], n of at least 2 for "wae-mmd".
            generator: Source of the prior's draws and of directions for the gradient penalty.
            beta: How much of its weight the penalty on codes has by now.
        """
        prior: list[Any] = []

        def choose(_: int, group: Group) -> Tensor:
            prior.append(group.prior)
            return group.posterior.loc  # type: ignore[union-attr]

        walked = walk(self.vae, choose, len(images), self.vae.encode(images))
        (z,), decoded = walked.latents, self.vae.emit(walked.state).mean
        with torch.autocast(images.device.type, enabled=False):
            codes, error = z.float(), (decoded.float() - images).square().mean()
            if self.objective == "wae-mmd":
                latent = imq_mmd(codes, prior[0].sample(generator=generator).float())
            else:
                latent = codes.square().mean()
            figures = {"error": error, "latent_penalty": self.latent_weight * latent}
            loss = error + beta * figures["latent_penalty"]
            if self.training and self.decoder_weight:
                if self.objective == "rae-gp":
                    penalty = gradient_penalty(decoded, z, generator=generator)
                else:
                    penalty = sum_of_squares(self.vae.decoder)
                figures["decoder_penalty"] = self.decoder_weight * penalty
                loss = loss + figures["decoder_penalty"]
        return loss, figures


def check_objective(
    objective: str, vae: Any, latent_weight: float | None, decoder_weight: float | None
) -> None:
    """See that an objective, the encoder and the weights go together, "elbo" included.

    Raises:
        ValueError: an unknown name, an encoder of the other kind, a weight that is negative or not
            finite, or one that the objective does not have.
    """
    if objective != "elbo" and objective not in OBJECTIVES:
        raise ValueError(
            f"objective must be one of elbo, {', '.join(OBJECTIVES)}, got {objective!r}"
        )
    deterministic = getattr(vae, "deterministic", False)
    if objective == "elbo" and deterministic:
        raise ValueError(
            "objective elbo needs posteriors with a scale, this encoder is deterministic; use "
            f"another posterior_scale, or an objective of {', '.join(OBJECTIVES)}"
        )
    if objective != "elbo" and not deterministic:
        raise ValueError(
            f"objective {objective} needs a deterministic encoder; build the VAE with "
            'posterior_scale = "deterministic"'
        )
    given = {"latent_weight": latent_weight, "decoder_weight": decoder_weight}
    has = OBJECTIVES.get(objective, (None, None))
    for (name, weight), usual in zip(given.items(), has, strict=True):
        if weight is None:
            continue
        if usual is None:
            raise ValueError(f"{name} is nothing that objective {objective} has, got {weight}")
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{name} must be finite and at least 0, got {weight}")


def imq_mmd(x: Tensor, y: Tensor, scales: Sequence[float] = SCALES) -> Tensor:
    """MMD^2 between the laws of x and y (n, d) under a sum of inverse multiquadratics, a scalar.

    k(a, b) = sum_s C_s / (C_s + |a - b|^2) with C_s = 2 d s. Pairs of a row with itself are left
    out within x and within y, so that the estimate is unbiased where rows of x and y are
    independent; it may be negative. Differentiable in both.

    Args:
        x: Rows (n, d) with n of at least 2.
        y: As many rows; for the constants they are taken to be of unit variance.
        scales: The s.

    Raises:
        ValueError: shapes that differ, or fewer than two rows.

    Reference: Tolstikhin et al. (ICLR 2018), section 4; the scales are those of their program.
    """
    if x.shape != y.shape or x.ndim != 2 or len(x) < 2:
        raise ValueError(
            "x and y must both be (n, d) with n of at least 2, "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    n, d = x.shape
    constants = [2 * d * scale for scale in scales]
    both = torch.cat([x, y])
    norms = both.square().sum(1)
    squared = (norms[:, None] + norms - 2 * both @ both.T).clamp_min(0)  # (2 n, 2 n)
    kernel = torch.stack([c / (c + squared) for c in constants]).sum(0)
    within = kernel[:n, :n].sum() + kernel[n:, n:].sum() - 2 * n * len(constants)
    return within / (n * (n - 1)) - 2 * kernel[:n, n:].mean()


def gradient_penalty(decoded: Tensor, z: Tensor, *, generator: Generator | None = None) -> Tensor:
    """|J|_F^2 / D, the mean over rows, where J (D, d) is the Jacobian of D decoded values in z.

    Times s^2 it is what noise of deviation s on the codes would add to the mean squared error, to
    first order. It is estimated without bias as E |J^T v|^2 with one v of independent signs per
    row; differentiable, so that it can be a loss.

    Args:
        decoded: (n, *image), computed from `z` with gradient.
        z: (n, d).
        generator: Source of the signs.

    Reference: Ghosh et al. (ICLR 2020), section 3.3; the estimate is Hutchinson's.
    """
    shape, device = decoded.shape, decoded.device
    signs = torch.randint(0, 2, shape, generator=generator, device=device).to(decoded) * 2 - 1
    (product,) = torch.autograd.grad((decoded * signs).sum(), z, create_graph=True)
    return product.float().square().sum() / decoded.numel()


def sum_of_squares(decoder: nn.Module) -> Tensor:
    """Of all weights with at least two axes; biases and factors of batch norms are free."""
    squares = [weight.square().sum() for weight in decoder.parameters() if weight.ndim > 1]
    if not squares:
        raise ValueError("decoder must have weights for its penalty, it has none")
    return torch.stack(squares).sum()
