"""Fit an energy on images by maximum likelihood, with short runs of Langevin dynamics."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncprior.data import ImageDataset, as_dataset
from ncprior.generation import draw
from ncprior.metrics.features import default_features
from ncprior.numerics import stream, stream_seed
from ncprior.priors import NoiseContrastivePrior
from ncprior.priors.fitting import first_weights
from ncprior.training.keeping import Place
from ncprior.training.loop import Diverged, optimise
from ncprior.training.processes import make_fabric
from ncprior.vaebm.energy import ImageEnergy, fingerprints
from ncprior.vaebm.job import EnergyJob, Starts
from ncprior.vaebm.joint import Joint
from ncprior.vaebm.network import NETWORKS
from ncprior.walk import evaluating

FEATURE_IMAGES = 20_000  # that principal components are fitted on


def fit_energy(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset | Tensor,
    *,
    rows: Tensor | None = None,
    heldout_rows: Tensor | None = None,
    network: str = "conv",
    network_options: dict[str, Any] | None = None,
    pixel_noise: bool = True,
    langevin_steps: int = 10,
    step_size: float = 0.1,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 2e-4,
    learning_rate_end: float = 0.0,
    betas: Sequence[float] = (0.99, 0.999),
    weight_decay: float = 3e-5,
    spectral_penalty: float = 0.2,
    energy_penalty: float = 0.0,
    clip_norm: float | None = None,
    replay: float = 0.0,
    replay_warmup: int = 0,
    starts: int = 10_000,
    proposals: int = 1000,
    heldout: float = 0.1,
    heldout_draws: int = 1000,
    retries: int = 3,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    evaluate_every: int = 100,
    checkpoint_every: int = 500,
    directory: Path | None = None,
    part: str = "",
    resume: bool = False,
    tensorboard: bool = True,
    progress: bool = True,
) -> ImageEnergy:
    """Fit E of the model p(x | z) p(z) exp(-E(x)) / Z on a frozen VAE and a frozen prior.

    The gradient is that of E[E(x_data)] - E[E(x_model)], x_model being ends of short runs. The
    weights kept are those whose short runs have the smallest Frechet distance to held-out images
    (in pixels, or 64 principal components of larger images), so that a fit which diverges in the
    end, as the published ones do, gives its last good state.

    Args:
        vae: Any VAE that offers the walk; flat or, with normal priors, of several groups.
        prior: A noise contrastive prior on it; None for the VAE's own, whichever it is.
        data: An `ImageDataset` or a tensor (n, c, h, w) in [0, 1].
        rows: Rows to fit on, usually the VAE's training images; all by default.
        heldout_rows: Rows that decide which weights are kept; a share `heldout` of `rows`, which
            then are not fitted on, by default.
        network: "conv" (`EnergyNetwork`), or "mlp" (`FlatEnergyNetwork`) for small images.
        network_options: Arguments of that network, such as channels and blocks, or hidden.
        pixel_noise: See `Joint`.
        langevin_steps, step_size: See `ImageEnergy`.
        steps: Optimiser steps.
        batch_size: Images, and runs, of a step.
        learning_rate: Peak rate of Adam; it falls along half a cosine.
        learning_rate_end: Where it falls to.
        betas: Adam's.
        weight_decay: Adam's, added to the gradient.
        spectral_penalty: Weight of the sum of the spectral norms of the convolutions.
        energy_penalty: Weight of the mean of E^2 over images and runs.
        clip_norm: Largest gradient norm; none by default.
        replay: Share of the runs that go on where an earlier run ended; the others start anew.
        replay_warmup: Steps over which that share rises from 0.
        starts: Draws of the prior from which runs start, made once; where the noise is N(0, I) they
            are drawn afresh instead. Also the size of the replay buffer.
        proposals: SIR's pool for each of them.
        heldout: Share of the rows that is held out.
        heldout_draws: Runs behind each held-out figure.
        retries: How often a run that meets NaN goes back, with half the learning rate.
        seed: Seed of all randomness.
        device: "auto", "cpu", "cuda" or "mps".
        precision: Lightning Fabric's, for the energy; the VAE keeps its own.
        evaluate_every: Steps between held-out figures.
        checkpoint_every: Steps between checkpoints.
        directory: Where checkpoints and logs go; nowhere by default.
        part: Added to their names.
        resume: Go on from the checkpoint in `directory`, if there is one.
        tensorboard: Also write TensorBoard logs.
        progress: Show progress bars.

    Returns:
        The energy; its `record` says how it was fitted and what was found.

    Raises:
        ValueError: settings that cannot work, before any step.
        Diverged: it diverged before any figure was taken.

    Reference: Xiao et al., "VAEBM: A Symbiosis between Variational Autoencoders and Energy-based
    Models" (ICLR 2021, arXiv 2010.00654). They keep the last state before divergence by eye.
    """
    _check_counts(
        steps=steps, batch_size=batch_size, starts=starts, proposals=proposals,
        langevin_steps=langevin_steps,
    )  # fmt: skip
    if not 0 <= replay <= 1 or not step_size > 0 or min(spectral_penalty, energy_penalty) < 0:
        raise ValueError(
            "replay must be between 0 and 1, step_size positive and penalties not negative, got "
            f"{replay=}, {step_size=}, {spectral_penalty=}, {energy_penalty=}"
        )
    if network not in NETWORKS:
        raise ValueError(f"network must be one of {', '.join(NETWORKS)}, got {network!r}")
    if heldout_draws < 2 or replay_warmup < 0:
        raise ValueError(
            "heldout_draws must be at least 2 and replay_warmup at least 0, got "
            f"{heldout_draws=}, {replay_warmup=}"
        )
    data = as_dataset(data)
    rows = torch.arange(len(data)) if rows is None else rows
    rows, heldout_rows = _split(rows, heldout_rows, heldout, seed)
    of = fingerprints(vae, prior)
    fabric = make_fabric(device, precision, alone=True)
    vae = vae.to(fabric.device)
    prior = None if prior is None else prior.to(fabric.device)
    with evaluating(vae):
        joint = Joint(vae, prior, pixel_noise=pixel_noise)
        joint.check_gradient()
        if joint.image_shape != tuple(data.image_shape):
            raise ValueError(
                f"data must hold images of shape {joint.image_shape} as the VAE makes them, got "
                f"{tuple(data.image_shape)}"
            )
        with first_weights(seed):
            made = NETWORKS[network](data.image_shape, **(network_options or {}))
        energy = ImageEnergy(
            made.to(fabric.device, joint.dtype),
            langevin_steps=langevin_steps,
            step_size=step_size,
            pixel_noise=pixel_noise,
        )

        def pool(num: int, purpose: str) -> Tensor:
            latents = draw(
                vae, prior, num, proposals=proposals, seed=stream_seed(seed, purpose),
                progress=progress,
            ).latents  # fmt: skip
            return joint.latent_noise([z.to(fabric.device) for z in latents])

        job = EnergyJob(
            energy,
            joint,
            data,
            rows,
            Starts(
                joint,
                None if joint.plain else pool(starts, "energy starts"),
                replay=replay,
                warmup=replay_warmup,
                buffer=starts,
                seed=seed,
            ),
            held=data.raw(heldout_rows),
            held_starts=pool(heldout_draws, "held-out energy starts"),
            features=default_features(data.raw(rows[:FEATURE_IMAGES])),
            batch_size=batch_size,
            spectral_penalty=spectral_penalty,
            energy_penalty=energy_penalty,
            precision=fabric.strategy.precision,
            seed=seed,
            of=of,
        )
        warnings = []
        try:
            history = optimise(
                job,
                fabric,
                place=Place(directory, "energy", resume, tensorboard, part=part),
                steps=steps,
                learning_rate=learning_rate,
                learning_rate_end=learning_rate_end,
                optimizer="adam",
                betas=(betas[0], betas[1]),
                weight_decay=weight_decay,
                clip_norm=clip_norm,
                retries=retries,
                seed=seed,
                evaluate_every=min(evaluate_every, steps),
                checkpoint_every=checkpoint_every,
                description="fitting the energy",
                progress=progress,
            )
            last = int(history[-1]["step"])
        except Diverged as error:
            if not job.best_weights:
                raise
            last = job.seen
            warnings.append(f"The fit diverged; its last good state is kept. {error}")
    energy.load_state_dict(job.best_weights)
    if job.best >= job.without:
        warnings.append(
            "No energy brought the samples nearer to held-out images than none does "
            f"(Frechet distance {job.best:.4g}, without {job.without:.4g})."
        )
    energy.record = of | {
        "settings": {
            "network": network,
            "network_options": network_options or {},
            "steps": steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "spectral_penalty": spectral_penalty,
            "energy_penalty": energy_penalty,
            "replay": replay,
        },
        "seed": seed,
        "steps": last,
        "best_step": job.best_step,
        "heldout_fd": job.best,
        "heldout_fd_without": job.without,
        "heldout_images": len(heldout_rows),
        "heldout_draws": heldout_draws,
        "features": job.features.name,
        "warnings": warnings,
    }
    return energy.eval().requires_grad_(False)


def _split(
    rows: Tensor, heldout_rows: Tensor | None, heldout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Rows to fit on and rows held out."""
    if heldout_rows is None:
        count = round(len(rows) * heldout)
        order = rows[torch.randperm(len(rows), generator=stream(seed, "energy held out"))]
        rows, heldout_rows = order[count:], order[:count]
    if len(heldout_rows) < 2 or len(rows) < 1:
        raise ValueError(
            f"heldout leaves {len(rows)} images to fit on and {len(heldout_rows)} held out; pass "
            "more images or another share (at least 1 and 2)"
        )
    return rows, heldout_rows


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
