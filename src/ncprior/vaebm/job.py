"""Maximum likelihood of an energy, as a job of the training loop."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import cached

from ncprior.data import ImageDataset
from ncprior.metrics.features import Features
from ncprior.metrics.frechet import frechet_distance, moments
from ncprior.numerics import stream
from ncprior.samplers import langevin
from ncprior.training.keeping import Diverged
from ncprior.training.order import RowOrder
from ncprior.training.regularisation import FIRST_ITERATIONS, LATER_ITERATIONS, NormPenalty
from ncprior.vaebm.energy import ImageEnergy
from ncprior.vaebm.joint import Joint
from ncprior.vaebm.sampling import with_pixels

ROWS_AT_ONCE = 250


def likelihood_loss(of_data: Tensor, of_runs: Tensor, penalty: float = 0.0) -> Tensor:
    """E[E(x_data)] - E[E(x_model)] in nats, from energies (n,) and (m,), plus a penalty on E^2.

    Its gradient in the energy's weights is that of minus the mean log-likelihood of the data, as
    far as x_model are draws of the model (Hinton 2002); its value is no loss.
    """
    loss = of_data.mean() - of_runs.mean()
    if penalty:
        loss = loss + penalty * (of_data.square().mean() + of_runs.square().mean())
    return loss


class Starts:
    """Where the runs of learning start.

    Args:
        joint: The joint density.
        pool: Noise of latents drawn from the prior, (n, size - pixels); None where it is N(0, I).
        replay: Share of the runs that go on from a buffer, once it has risen.
        warmup: Steps over which it rises.
        buffer: Rows of the buffer, which begins with fresh starts.
        seed: Decides these.
    """

    def __init__(
        self,
        joint: Joint,
        pool: Tensor | None = None,
        *,
        replay: float = 0.0,
        warmup: int = 0,
        buffer: int = 1,
        seed: int = 0,
    ) -> None:
        self.joint, self.pool, self.replay, self.warmup = joint, pool, replay, warmup
        self.device = next(joint.vae.parameters()).device
        self.buffer: Tensor | None = None
        if replay:
            self.buffer = self._fresh(buffer, stream(seed, "replay buffer", device=self.device))

    def __call__(self, num: int, step: int, generator: Generator) -> tuple[Tensor, Tensor | None]:
        """Noise (num, size) to start from, and the rows of the buffer that it belongs to."""
        fresh = self._fresh(num, generator)
        if self.buffer is None:
            return fresh, None
        rows = torch.randint(len(self.buffer), (num,), generator=generator, device=self.device)
        share = self.replay * min(1.0, (step + 1) / max(1, self.warmup))
        old = torch.rand(num, 1, generator=generator, device=self.device) < share
        return torch.where(old, self.buffer[rows], fresh), rows

    def keep(self, rows: Tensor | None, ends: Tensor) -> None:
        if self.buffer is not None and rows is not None:
            self.buffer[rows] = ends

    def _fresh(self, num: int, generator: Generator) -> Tensor:
        options: Any = {"generator": generator, "device": self.device}
        if self.pool is None:
            return torch.randn(num, self.joint.size, dtype=self.joint.dtype, **options)
        rows = torch.randint(len(self.pool), (num,), **options)
        return with_pixels(self.joint, self.pool[rows], generator)


class EnergyJob:
    """An energy, its data and its runs.

    Args:
        energy: What is trained, with its steps and their size.
        joint: The joint density without it.
        data: The images; `rows` of them are fitted on.
        rows: Those rows.
        starts: Where runs start.
        held: Held-out images (n, c, h, w).
        held_starts: Noise of latents (m, size - pixels) from which held-out runs start.
        features: In which the two are compared.
        batch_size: Images, and runs, of a step.
        spectral_penalty, energy_penalty: See `fit_energy`.
        precision: Fabric's, in which the energy is computed.
        seed: Decides the order of the images and all noise that is not the step's.
        of: Fingerprints of what is frozen.
    """

    def __init__(
        self,
        energy: ImageEnergy,
        joint: Joint,
        data: ImageDataset,
        rows: Tensor,
        starts: Starts,
        *,
        held: Tensor,
        held_starts: Tensor,
        features: Features,
        batch_size: int,
        spectral_penalty: float = 0.0,
        energy_penalty: float = 0.0,
        precision: Any,
        seed: int,
        of: dict[str, str],
    ) -> None:
        self.energy, self.joint, self.data, self.starts = energy, joint, data, starts
        self.module = _Trained(energy, NormPenalty(energy, generator=stream(seed, "norms")))
        self.device, self.precision = starts.device, precision
        self.module.to(self.device)
        self.order = RowOrder(rows, batch_size, seed=seed)
        self.batch_size, self.seed, self.of = batch_size, seed, of
        self.spectral_penalty, self.energy_penalty = spectral_penalty, energy_penalty
        self.held, self.held_starts, self.features = held, held_starts, features
        self.held_moments = moments(features(held))
        self.best, self.best_step, self.seen = math.inf, 0, 0
        self.best_weights: dict[str, Tensor] = {}
        self.without = self._distance(None)

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        start, rows = self.starts(self.batch_size, step, generator)
        ends = self._run(start, self.energy, generator)
        self.starts.keep(rows, ends)
        with torch.no_grad():
            runs = self.joint.decode(ends)[0]
        own = stream(self.seed, "energy images", step) if self.data.redrawn else None
        images = self.data.batch(self.order(step), generator=own).to(runs)
        energies = model(torch.cat([images, runs]))
        at_data, at_runs = energies.to(runs).split(self.batch_size)
        loss = likelihood_loss(at_data, at_runs, self.energy_penalty)
        figures = {"energy_gap": (at_runs.mean() - at_data.mean()).detach()}
        if self.spectral_penalty:
            iterations = FIRST_ITERATIONS if step == 0 else LATER_ITERATIONS
            norms = self.module.norms(self.energy, iterations)
            loss, figures["norms"] = loss + self.spectral_penalty * norms, norms
        return loss, figures

    def evaluate(self, step: int) -> dict[str, float]:
        distance = self._distance(self.energy)
        self.seen = step
        if distance < self.best:
            self.best, self.best_step = distance, step
            state = self.energy.state_dict()
            self.best_weights = {name: value.clone() for name, value in state.items()}
        return {"heldout_fd": distance}

    def should_stop(self) -> bool:
        return False

    def identity(self) -> dict[str, Any]:
        names = {f"{name} (fingerprint)": value for name, value in self.of.items()}
        return names | {
            "batch_size": self.batch_size,
            "langevin_steps": self.energy.langevin_steps,
            "step_size": self.energy.step_size,
            "pixel_noise": self.energy.pixel_noise,
            "replay": self.starts.replay,
            "spectral_penalty": self.spectral_penalty,
            "energy_penalty": self.energy_penalty,
            "training images": len(self.order.rows),
        }

    def state_dict(self) -> dict[str, Any]:
        names = ("best", "best_step", "best_weights", "seen")
        return {name: getattr(self, name) for name in names} | {"buffer": self.starts.buffer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        buffer = state.pop("buffer")
        if buffer is not None:
            self.starts.buffer = buffer.to(self.device)
        for name, value in state.items():
            setattr(self, name, value)
        self.best_weights = {name: v.to(self.device) for name, v in self.best_weights.items()}

    def _run(self, start: Tensor, energy: Callable[[Tensor], Tensor], generator: Generator) -> Any:
        """Ends of short runs (n, size)."""

        def in_precision(images: Tensor) -> Tensor:
            with self.precision.forward_context():
                return energy(images).to(images)

        try:
            with cached():  # the weights stay as they are during a run
                return langevin(
                    self.joint.log_density(in_precision),
                    start,
                    steps=self.energy.langevin_steps,
                    step_size=self.energy.step_size,
                    generator=generator,
                ).samples
        except ValueError as error:  # all else was checked: the dynamics left the finite numbers
            raise Diverged(f"a Langevin run broke down ({error})") from None

    @torch.no_grad()
    def _distance(self, energy: Callable[[Tensor], Tensor] | None) -> float:
        """Frechet distance of runs from the held-out starts to the held-out images.

        Without an energy it is that of the starts themselves, pixel noise apart: what the VAE gives
        otherwise are means.
        """
        generator = stream(self.seed, "held-out runs", device=self.device)
        parts = []
        for some in self.held_starts.split(ROWS_AT_ONCE):
            start = with_pixels(self.joint, some, generator)
            if energy is None:
                start[:, some.shape[1] :] = 0.0
                ends = start
            else:
                ends = self._run(start, energy, generator)
            parts.append(self.joint.decode(ends)[0].clamp(0, 1).cpu())
        images = torch.cat(parts)
        return frechet_distance([moments(self.features(images))], [self.held_moments])


class _Trained(nn.Module):
    """The energy and what its penalty on norms remembers."""

    def __init__(self, energy: ImageEnergy, norms: NormPenalty) -> None:
        super().__init__()
        self.energy, self.norms = energy, norms

    def forward(self, images: Tensor) -> Tensor:
        return self.energy(images)
