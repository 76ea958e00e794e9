"""Draw images of a VAE with an energy: draws of the prior, moved by Langevin dynamics."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from ncprior.generation import Draws, draw
from ncprior.groups import check_groups
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.samplers import langevin
from ncprior.training.progress import progress_bar
from ncprior.vaebm.energy import ImageEnergy
from ncprior.vaebm.joint import Joint
from ncprior.walk import device_of, evaluating


@torch.no_grad()
def draw_with_energy(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    energy: ImageEnergy,
    num: int = 64,
    *,
    langevin_steps: int | None = None,
    step_size: float | None = None,
    groups: str | Sequence[int] | None = None,
    seed: int = 0,
    first: int = 0,
    batch_size: int = 500,
    progress: bool = False,
    **options: Any,
) -> Draws:
    """Draw images from p(x | z) p(z) exp(-E(x)) by a short run of Langevin dynamics.

    The run starts at draws of the prior (by SIR for a noise contrastive one) with fresh pixel noise
    and moves both. Draw i depends on `seed` and i alone.

    Args:
        vae: The VAE that the energy was fitted on.
        prior: The prior that it was fitted on; None for the VAE's own.
        energy: The energy.
        num: Number of images.
        langevin_steps: Steps of the run; those of learning by default. Published: more at the test.
        step_size: eta; that of learning by default.
        groups: Latent groups that use the NCP; see `draw`.
        seed: Seed of everything drawn.
        first: Number of the first draw.
        batch_size: Images at a time.
        progress: Show progress bars.
        options: Other arguments of `draw`, for the starts; `steps` and `final_step_size` are those
            of its Langevin sampler.

    Returns:
        Images with their pixel noise where the energy has it, cut to [0, 1], else means of the
        likelihood; latents at the end of the run; pool sizes of the starts.

    Raises:
        ValueError: an energy for another VAE or prior, images to reconstruct, a temperature or
            batch-norm passes, or an argument out of range.
    """
    refused = {"images": None, "temperature": 1.0, "batch_norm_passes": 0}
    for name, neutral in refused.items():
        if options.get(name, neutral) != neutral:
            raise ValueError(f"{name} cannot be used with an energy, got {options[name]!r}")
    energy.check(vae, prior)
    starts = draw(
        vae, prior, num, groups=groups, seed=seed, first=first, batch_size=batch_size,
        progress=progress, **options,
    )  # fmt: skip
    if prior is not None and groups is not None:
        prior = prior.only(check_groups(groups, vae.num_groups))
    joint = Joint(vae, prior, pixel_noise=energy.pixel_noise)
    joint.check_gradient()
    device = device_of(vae)
    batches = []
    with evaluating(joint.vae), progress_bar("Langevin", num, shown=progress) as bar:
        for done in range(0, num, batch_size):
            some = slice(done, min(done + batch_size, num))
            count = some.stop - done
            streams = [stream(seed, "energy", first + done + i, device) for i in range(count)]
            noise = joint.latent_noise([z[some].to(device) for z in starts.latents])
            run = langevin(
                joint.log_density(energy),
                with_pixels(joint, noise, streams),
                steps=langevin_steps or energy.langevin_steps,
                step_size=step_size or energy.step_size,
                generator=streams,
            )
            images, _, latents = joint.decode(run.samples)
            batches.append((images.clamp(0, 1).cpu(), [z.cpu() for z in latents]))
            bar(some.stop)
    return Draws(
        torch.cat([images for images, _ in batches]),
        [torch.cat(parts) for parts in zip(*(z for _, z in batches), strict=True)],
        starts.ess,
    )


def with_pixels(joint: Joint, noise: Tensor, generator: Generator | Sequence[Generator]) -> Tensor:
    """Noise of latents (n, size - pixels) beside fresh noise of pixels, (n, size)."""
    count = joint.num_pixels
    options: Any = {"device": noise.device, "dtype": noise.dtype}
    if isinstance(generator, Generator):
        pixels = torch.randn(len(noise), count, generator=generator, **options)
    else:
        pixels = torch.stack([torch.randn(count, generator=g, **options) for g in generator])
    return torch.cat([noise, pixels], 1)
