"""What priors over d latents have in common: their shapes, and codes brought to a common scale."""

import torch
from torch import Tensor, nn

from ncprior.priors.codes import Codes


class LatentPrior(nn.Module):
    """A density over latents of size d; its networks see `inner(z)`, of mean 0 and variance 1.

    Args:
        latent_size: d.
    """

    normalized: bool
    draws_together = 500  # one draw takes nearly as long as many
    slow_density = False  # whether an equation is solved for the density of each z
    slow_draws = False  # whether each draw takes a chain, an equation or a pool of its own
    loc: Tensor  # (d,)
    spread: Tensor  # (d,)

    def __init__(self, latent_size: int) -> None:
        super().__init__()
        if latent_size < 1:
            raise ValueError(f"latent_size must be at least 1, got {latent_size}")
        self.latent_size = latent_size
        self.register_buffer("loc", torch.zeros(latent_size))
        self.register_buffer("spread", torch.ones(latent_size))

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (self.latent_size,)

    def standardize(self, codes: Codes) -> None:
        """Take mean and spread from codes; a latent that never varies keeps a tiny spread."""
        mean, spread = codes.moments()
        self.loc.copy_(mean)
        self.spread.copy_(spread.clamp_min(1e-6 * float(spread.max().clamp_min(1e-30))))

    def inner(self, z: Tensor) -> Tensor:
        """z (..., d) in the coordinate of the networks."""
        return (z - self.loc) / self.spread

    def outer(self, x: Tensor) -> Tensor:
        """The inverse of `inner`."""
        return x * self.spread + self.loc

    def log_det(self) -> Tensor:
        """log |d inner / d z| in nats: log p(z) = log p(inner(z)) + log_det(), ()."""
        return -self.spread.log().sum()

    def tempered(self, temperature: float) -> "LatentPrior":
        """The density itself at temperature 1; others only where a prior says how."""
        if temperature == 1:
            return self
        raise ValueError(
            f"{type(self).__name__} has no temperature but 1, got {temperature}; "
            "Gaussian, mixture, Vamp, flow, diffusion, LARS, SNIS and energy priors have one"
        )
