"""A run directory: what it holds, and how it is read.

config.toml      format, version and the recipe
splits.npz       rows of the data set for train, validation, test (and fit, heldout)
vae/, ncp/       config.json and model.safetensors
metrics.json     every figure measured, with its error, unit, samples and seed
samples/         drawn images and latents
logs/            training curves: CSV and TensorBoard
report.html
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import tomli_w
import torch
from torch import Tensor

from ncprior import __version__
from ncprior.data import ImageDataset, Splits, load_data
from ncprior.figures import Figures, as_json, from_json
from ncprior.priors import NoiseContrastivePrior
from ncprior.recipes import Recipe, check_recipe
from ncprior.storage import (
    fingerprint,
    load_tensors,
    read_json,
    restore,
    save_tensors,
    write_bytes,
    write_json,
)
from ncprior.vaes import NVAE, build_vae

FORMAT = 1
VAES: dict[str, Callable[..., Any]] = {"FlatVAE": build_vae, "NVAE": NVAE}
"""What makes a VAE of the arguments in vae/config.json."""


class Run:
    """A run directory that exists; make one with `create`, read one with `open`."""

    def __init__(self, path: Path, config: dict[str, Any]) -> None:
        self.path, self.config = path, config

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> Self:
        """Make the directory and write the recipe into it."""
        cls.check_new(path)
        run = cls(path, {"format": FORMAT, "version": __version__} | recipe)
        run.write_config()
        return run

    @staticmethod
    def check_new(path: Path) -> None:
        """Raise ValueError where no run directory can be made."""
        if path.exists() and not path.is_dir():
            raise ValueError(f"--out {path} is a file; name a directory that is new or a run")
        if path.is_dir() and any(path.iterdir()) and not (path / "config.toml").exists():
            raise ValueError(f"--out {path} holds other files; name an empty or new directory")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a run directory.

        Raises:
            FileNotFoundError: it is none.
            ValueError: it was made by another format version, or its config is damaged.
        """
        import tomllib

        file = path / "config.toml"
        if not path.is_dir():
            raise FileNotFoundError(f"run directory {path} does not exist{_others(path)}")
        if not file.exists():
            raise FileNotFoundError(
                f"{path} is not a run directory (no config.toml); make one with "
                f"'ncprior train RECIPE --out {path}'"
            )
        try:
            config = tomllib.loads(file.read_text())
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is damaged: {error}") from None
        if config.get("format") != FORMAT:
            raise ValueError(
                f"{path} was made by ncprior {config.get('version', '?')} in run format "
                f"{config.get('format')!r}; this is ncprior {__version__}, which reads format "
                f"{FORMAT}. Use that version, or train anew"
            )
        check_recipe({k: v for k, v in config.items() if isinstance(v, dict)}, str(file))
        return cls(path, config)

    def write_config(self) -> None:
        write_bytes(self.path / "config.toml", tomli_w.dumps(self.config).encode())

    def section(self, name: str) -> dict[str, Any]:
        return dict(self.config.get(name, {}))

    @property
    def has_vae(self) -> bool:
        return (self.path / "vae" / "config.json").exists()

    @property
    def has_prior(self) -> bool:
        return (self.path / "ncp" / "config.json").exists()

    def load_data(self) -> tuple[ImageDataset, Splits]:
        """The images, with the splits that the run recorded once it did."""
        recorded = self.read_splits()
        if self.has_vae and not recorded and "data" not in self.config:  # it was converted
            raise ValueError(
                f"{self.path} does not say which images its VAE was trained on; add a section "
                f'[data] to {self.path}/config.toml, with source = "..." and what else '
                "ncprior.load_data takes"
            )
        data, splits = load_data(**self.section("data"))
        if recorded:
            kept = Splits(*(recorded[name] for name in Splits._fields))
            if max(int(rows.max()) for rows in kept) >= len(data):
                raise ValueError(
                    f"{self.path}/splits.npz names rows that the data set of {len(data)} images "
                    "lacks; the data have changed since the run was made"
                )
            return data, kept
        self.write_splits(**splits._asdict())
        return data, splits

    def read_splits(self) -> dict[str, Tensor]:
        file = self.path / "splits.npz"
        if not file.exists():
            return {}
        try:
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except (ValueError, EOFError, BadZipFile) as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); train anew") from None

    def write_splits(self, **rows: Tensor) -> None:
        """Add named rows to splits.npz."""
        content = io.BytesIO()
        arrays: dict[str, Any] = {k: v.numpy() for k, v in (self.read_splits() | rows).items()}
        np.savez(content, **arrays)
        write_bytes(self.path / "splits.npz", content.getvalue())

    def save_vae(self, vae: Any) -> None:
        config = {"format": FORMAT, "class": type(vae).__name__, "arguments": vae.config}
        save_tensors(self.path / "vae", config, vae.state_dict())

    def load_vae(self) -> Any:
        """The trained VAE, in evaluation mode."""
        if not self.has_vae:
            raise FileNotFoundError(
                f"{self.path} holds no trained VAE yet; finish "
                f"'ncprior train RECIPE --out {self.path} --resume'"
            )
        return load_vae(self.path)

    def save_prior(self, prior: NoiseContrastivePrior) -> None:
        if prior.heldout_rows is not None:
            train = self.read_splits()["train"]
            fitted = train[~torch.isin(train, prior.heldout_rows)]
            self.write_splits(fit=fitted, heldout=prior.heldout_rows)
        prior.save_pretrained(self.path / "ncp")

    def load_prior(self, vae: Any) -> NoiseContrastivePrior:
        """The fitted prior, which must have been fitted on `vae`."""
        if not self.has_prior:
            raise FileNotFoundError(
                f"{self.path} holds no noise contrastive prior yet; run 'ncprior fit {self.path}'"
            )
        prior = NoiseContrastivePrior.from_pretrained(self.path / "ncp")
        if prior.record.get("vae") != fingerprint(vae):
            raise ValueError(
                f"the prior in {self.path}/ncp was fitted on another VAE than the one in "
                f"{self.path}/vae; run 'ncprior fit {self.path} --overwrite'"
            )
        prior.attach(vae)
        return prior

    def metrics(self) -> Figures:
        file = self.path / "metrics.json"
        return from_json(read_json(file)) if file.exists() else {}

    def add_metrics(self, figures: Figures) -> None:
        write_json(self.path / "metrics.json", as_json(self.metrics() | figures))


def load_vae(path: str | Path) -> Any:
    """The VAE of a run directory, in evaluation mode, on the CPU."""
    directory = Path(path) / "vae"
    config, tensors = load_tensors(directory)
    if config.get("format") != FORMAT or config.get("class") not in VAES:
        raise ValueError(
            f"{directory}/config.json is of format {config.get('format')!r} and class "
            f"{config.get('class')!r}; this version reads {' and '.join(VAES)} of format {FORMAT}"
        )
    vae = VAES[config["class"]](**config["arguments"])
    restore(vae, tensors, directory)
    return vae.eval()


def _others(path: Path) -> str:
    """The runs beside a path that does not exist."""
    if not path.parent.is_dir():
        return ""
    found = sorted(p.parent.name for p in path.parent.glob("*/config.toml"))
    return f"; in {path.parent} there are {', '.join(found[:8])}" if found else ""
