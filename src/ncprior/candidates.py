"""The priors that `compare` takes by name: what names say, how each is fitted and kept."""

import hashlib
import inspect
import json
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from ncprior.data import ImageDataset, Splits
from ncprior.numerics import stream
from ncprior.priors import PRIORS, Codes, NoiseContrastivePrior, fit_density, parse_name
from ncprior.priors.pretrained import load_density, save_density
from ncprior.recipes import suggestion
from ncprior.sources import training_images
from ncprior.storage import fingerprint, read_json, write_json
from ncprior.training import combine, fit_prior, settings_of
from ncprior.training.bases import codes_of
from ncprior.training.progress import progress_bar
from ncprior.walk import device_of

RATIOS: dict[str, dict[str, Any]] = {
    "ncp": {},
    "ncp-multistage": {"stages": "adaptive", "preset": "stages"},  # a larger one learns the pools
    "ncp-reencoded": {"reencode": True},
}
"""Noise contrastive priors on the VAE's own prior by name, as arguments of `fit_prior`."""
ON_BASE = {"ncp-reencoded-": {"reencode": True}, "ncp-": {}}
"""What those on another base begin with, and their arguments; the name of the base follows."""
NAMES = (*PRIORS, "mixture-N", "mixture-auto", *RATIOS, "ncp-BASE", "A+B")
"""What `compare` takes, in words."""
COMBINED = "+"
"""Between the names of priors that are combined."""
FIT, SCORES = "fit.json", "scores.json"
"""Beside each prior that is kept: what it was fitted by, and how it was measured."""
NEUTRAL = {"preset", "progress", "tensorboard", "checkpoint_every", "directory", "resume", "report"}
"""Arguments of fits that change nothing of what is fitted; a preset counts by what it says."""


class Candidates:
    """Priors of one frozen VAE, each fitted when it is asked for unless it is kept already.

    Args:
        vae: A VAE with one latent group.
        data: Its images.
        splits: Priors are fitted on those for training, weights of combined ones on validation.
        fit: Arguments of `fit_prior` for all noise contrastive priors.
        directory: Where fitted priors are kept; nowhere by default.
        resume: Take up those that are kept.
        progress: Show progress bars.
    """

    def __init__(
        self,
        vae: Any,
        data: ImageDataset,
        splits: Splits,
        *,
        fit: dict[str, Any],
        directory: Path | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.vae, self.data, self.splits, self.fit = vae, data, splits, fit
        self.directory, self.resume, self.progress = directory, resume, progress
        self.device = device_of(vae)

    @cached_property
    def codes(self) -> Codes:
        """What the encoder says of the training images."""
        return codes_of(
            self.vae, self.data, self.splits.train,
            generator=stream(0, "codes"), device=self.device,
        )  # fmt: skip

    @cached_property
    def images(self) -> str:
        """What tells other data, or other splits of them, apart."""
        found = hashlib.sha256(self.data.digest().encode())
        for rows in self.splits:
            found.update(rows.numpy().tobytes())
        return found.hexdigest()

    def settings(self, name: str) -> dict[str, Any]:
        """What a fit depends on beside VAE, images and seed, with all defaults spelt out."""
        parts, own = parts_of(name), ratio_options(name)
        if parts:
            return {part: self.settings(part) for part in parts}
        if own is None:
            kind, given = parse_name(name)
            settled = _defaults(PRIORS[kind].fit) | given
        else:
            given = {key: value for key, value in (self.fit | own).items() if value is not None}
            resolved = settings_of(self.vae, len(self.splits.train), **given)
            settled = _defaults(fit_prior) | given | resolved
        settled = {key: value for key, value in settled.items() if key not in NEUTRAL}
        found: dict[str, Any] = json.loads(json.dumps(settled, default=_plain))
        return found

    def fitted(self, names: Sequence[str], seed: int) -> dict[str, tuple[Any, float]]:
        """The priors and the seconds that their fits took; of combined ones with their parts'."""
        found: dict[str, tuple[Any, float]] = {}
        for name in [each for wanted in names for each in (*parts_of(wanted), wanted)]:
            if name not in found:
                found[name] = self._kept(name, seed) or self._fit(name, seed, found)
        return {name: found[name] for name in names}

    def _wanted(self, name: str) -> dict[str, Any]:
        """What is kept beside a prior and must be the same for it to be taken up."""
        return {"vae": fingerprint(self.vae), "images": self.images, "fit": self.settings(name)}

    def _kept(self, name: str, seed: int) -> tuple[Any, float] | None:
        if self.directory is None or not self.resume:
            return None
        found = load_fitted(self.directory, name, seed, self.vae, self._wanted(name))
        return found and (found[0].to(self.device), found[1])

    def _fit(self, name: str, seed: int, found: dict[str, tuple[Any, float]]) -> tuple[Any, float]:
        began = time.perf_counter()
        prior: Any
        own, parts = ratio_options(name), parts_of(name)
        vae, data, splits = self.vae, self.data, self.splits
        if parts:
            prior = combine(
                vae, [found[part][0] for part in parts], data, rows=splits.validation, names=parts,
                seed=seed, progress=self.progress, device=self.fit.get("device", "auto"),
            )  # fmt: skip
        elif own is not None:
            options = {"seed": seed, "progress": self.progress, "tensorboard": False}
            prior = fit_prior(vae, data, rows=splits.train, **options | self.fit | own)
        else:
            with progress_bar(f"fitting {name}, seed {seed}", 1, shown=self.progress) as bar:
                starts = training_images(data, splits, seed) if name == "vamp" else None
                prior = fit_density(name, self.codes, vae=vae, images=starts, seed=seed)
                bar(1)
        seconds = time.perf_counter() - began + sum(found[part][1] for part in parts)
        if self.directory is not None:
            where = self.directory / f"{name}-{seed}"
            for stale in (FIT, SCORES):  # they are of the prior that was here before
                (where / stale).unlink(missing_ok=True)
            if isinstance(prior, NoiseContrastivePrior):
                prior.save_pretrained(where)
            else:
                save_density(prior, where)
            write_json(where / FIT, self._wanted(name) | {"seconds": seconds})
        vae.to(self.device)  # where a fit on another device has left it
        return prior.to(self.device), seconds


def _defaults(fit: Callable[..., Any]) -> dict[str, Any]:
    """The arguments of a function that need not be given, and what they are then."""
    arguments = inspect.signature(fit).parameters.items()
    return {name: of.default for name, of in arguments if of.default is not of.empty}


def _plain(value: Any) -> Any:
    """What stands for a value that JSON lacks."""
    if isinstance(value, nn.Module):
        return fingerprint(value)
    return value.item() if hasattr(value, "item") else str(value)


def check_names(priors: Sequence[str], others: Sequence[str] = ()) -> None:
    """Raise ValueError for priors that `compare` does not take; `others` would do as well."""
    unknown = [name for name in priors if not is_known(name)]
    if unknown or not priors:
        bases = (*PRIORS, "mixture-auto")
        near = [*filter(is_known, (*bases, *RATIOS, *(f"ncp-{base}" for base in bases))), *others]
        raise ValueError(
            f"priors must be some of {', '.join(dict.fromkeys((*others, *NAMES)))}, got "
            f"{', '.join(unknown) + suggestion(unknown[0], near) if unknown else 'none'}"
        )


def is_known(name: str) -> bool:
    """Whether `compare` takes a prior of that name."""
    if parts := parts_of(name):
        return all(is_known(part) for part in parts)
    if name in RATIOS:
        return True
    try:
        kind, _ = parse_name(_base(name)[0])
    except ValueError:
        return False
    return kind != "gaussian" or name == kind


def parts_of(name: str) -> list[str]:
    """The priors that one is combined from; none if it is not."""
    return name.split(COMBINED) if COMBINED in name else []


def ratio_options(name: str) -> dict[str, Any] | None:
    """Arguments of `fit_prior` for a noise contrastive prior; None for a prior of another kind."""
    if name in RATIOS:
        return RATIOS[name]
    base, options = _base(name)
    return None if options is None else options | {"base": base}


def _base(name: str) -> tuple[str, dict[str, Any] | None]:
    """The base that a name ends in, and the ratio's arguments; None for a prior without one."""
    for start, options in ON_BASE.items():
        if name.startswith(start):
            return name.removeprefix(start), options
    return name, None


def load_fitted(
    directory: Path, name: str, seed: int, vae: Any, wanted: dict[str, Any] | None = None
) -> tuple[Any, float] | None:
    """A prior that was kept and the seconds of its fit; None if it is not there.

    Nor if it is of another VAE, or if what is kept beside it differs from what is `wanted`.
    """
    where = directory / f"{name}-{seed}"
    if not (where / FIT).exists():
        return None
    known = read_json(where / FIT)
    wanted = {"vae": fingerprint(vae)} if wanted is None else wanted
    if any(known.get(key) != value for key, value in wanted.items()):
        return None
    if ratio_options(name) is None and not parts_of(name):
        return load_density(where), known["seconds"]
    return NoiseContrastivePrior.from_pretrained(where, vae=vae), known["seconds"]
