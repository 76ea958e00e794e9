"""What images are drawn from, and draws that are kept on disk until all is measured."""

import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ncprior.data import ImageDataset, Splits
from ncprior.generation import Draws, draw
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.storage import fingerprint, read_json, write_bytes, write_json
from ncprior.training.progress import progress_bar
from ncprior.vaebm import ImageEnergy, draw_with_energy

RECONSTRUCTED_IMAGES = 20_000
RECONSTRUCTED_NUMBERS = 1 << 26  # pixels times channels held for them
PART = 1000  # draws in a file


class WithEnergy(NamedTuple):
    """Any prior, None for the VAE's own, and an energy on images that was fitted on it."""

    prior: Any
    energy: ImageEnergy


class Source(NamedTuple):
    """A VAE on some base prior; with a ratio or an energy on it, or with images to reconstruct."""

    vae: Any
    prior: NoiseContrastivePrior | None = None
    images: Tensor | None = None
    energy: ImageEnergy | None = None

    @classmethod
    def of(cls, vae: Any, prior: Any) -> "Source":
        """The source of samples of `vae` under any prior; None for its own."""
        if isinstance(prior, WithEnergy):
            return cls.of(vae, prior.prior)._replace(energy=prior.energy)
        if prior is None:
            return cls(vae)
        if isinstance(prior, NoiseContrastivePrior):
            return cls(prior.under(vae), prior)
        return cls(vae.with_prior(prior))

    def identity(self) -> list[Any]:
        """What its draws depend on, seed and options apart."""
        base = getattr(self.vae, "prior", None)
        parts = [m for m in (self.vae, base, self.prior, self.energy) if isinstance(m, nn.Module)]
        shape = None if self.images is None else list(self.images.shape)
        run = self.energy and (self.energy.langevin_steps, self.energy.step_size)
        return [*map(fingerprint, parts), shape, *(run or ())]

    def draw(self, num: int, **options: Any) -> Draws:
        """`num` draws; the options are those of `draw`, and of `draw_with_energy` with an energy.

        There too `steps` and `final_step_size` are those of the Langevin sampler of an NCP.
        """
        if self.energy is None:
            return draw(self.vae, self.prior, num, images=self.images, **options)
        return draw_with_energy(self.vae, self.prior, self.energy, num, **options)


def reconstructions(vae: Any, data: ImageDataset, splits: Splits, seed: int) -> Source:
    """Decoded draws of the training images' aggregate posterior: the best that a prior can do."""
    return Source(vae, images=training_images(data, splits, seed))


def training_images(data: ImageDataset, splits: Splits, seed: int) -> Tensor:
    """Training images as the encoder reads them, some of them where there are very many."""
    rows, numbers = splits.train, math.prod(data.image_shape)
    most = max(1, min(RECONSTRUCTED_IMAGES, RECONSTRUCTED_NUMBERS // numbers))
    if len(rows) > most:
        order = torch.randperm(len(rows), generator=stream(seed, "reconstructed rows"))
        rows = rows[order[:most]]
    draws = stream(seed, "reconstructed images") if data.redrawn else None
    return data.batch(rows, generator=draws)


class Kept:
    """Draws and answers on disk, so that a job that was stopped goes on where it was.

    Args:
        directory: Where they lie; None keeps nothing.
        resume: Take up what an earlier job left there; else it is removed.
    """

    def __init__(self, directory: Path | None, *, resume: bool = False) -> None:
        self.directory = directory
        if directory is not None and not resume:
            shutil.rmtree(directory, ignore_errors=True)

    def draws(
        self, name: str, source: Source, num: int, *, seed: int, progress: bool, **options: Any
    ) -> Draws:
        """`draw` from a source, part by part; parts that are on disk are read."""
        if self.directory is None:
            return source.draw(num, seed=seed, progress=progress, **options)
        lasting = {k: v for k, v in options.items() if k not in ("batch_size", "chunk")}
        where = self._place(name, source.identity(), seed, lasting)
        parts = []
        with progress_bar(f"sampling {name}", num, shown=progress) as bar:
            for first in range(0, num, PART):
                count, file = min(PART, num - first), where / f"{first}.safetensors"
                found = _read(file)
                if found is None or len(found.images) < count:
                    found = source.draw(count, seed=seed, first=first, **options)
                    _write(file, found)
                parts.append(_cut(found, count))
                bar(first + count)
        return Draws(
            torch.cat([part.images for part in parts]),
            [torch.cat(latents) for latents in zip(*(p.latents for p in parts), strict=True)],
            torch.cat([part.ess for part in parts], 1),
        )

    @contextmanager
    def answer(self, name: str, *depends_on: Any) -> Iterator[dict[str, Any]]:
        """A dictionary that is on disk once the block has filled it; full already if it is there.

        With nothing kept it is empty. What it depends on must be plain values.
        """
        if self.directory is None:
            yield {}
            return
        file = self._place(name, *depends_on) / "answer.json"
        content: dict[str, Any] = read_json(file) if file.exists() else {}
        known = bool(content)
        yield content
        if not known:
            write_json(file, content)

    def clear(self) -> None:
        """Remove everything: the job is done."""
        if self.directory is not None:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _place(self, name: str, *depends_on: Any) -> Path:
        assert self.directory is not None
        text = json.dumps(depends_on, sort_keys=True, default=str)
        return self.directory / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _read(file: Path) -> Draws | None:
    if not file.exists():
        return None
    tensors = load_file(file)
    latents = [tensors[f"latents_{k}"] for k in range(len(tensors) - 2)]
    return Draws(tensors["images"], latents, tensors["ess"])


def _write(file: Path, draws: Draws) -> None:
    tensors = {f"latents_{k}": z for k, z in enumerate(draws.latents)}
    tensors |= {"images": draws.images, "ess": draws.ess}
    write_bytes(file, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _cut(draws: Draws, count: int) -> Draws:
    return Draws(draws.images[:count], [z[:count] for z in draws.latents], draws.ess[:, :count])
