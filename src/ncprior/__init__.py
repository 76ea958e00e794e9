"""Mend the prior of a variational autoencoder with noise contrastive priors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Bernoulli": "ncprior.vaes",
    "Categorical": "ncprior.vaes",
    "FlatVAE": "ncprior.vaes",
    "Gaussian": "ncprior.vaes",
    "GaussianMixture": "ncprior.priors",
    "ImageEnergy": "ncprior.vaebm",
    "ImageDataset": "ncprior.data",
    "NVAE": "ncprior.vaes",
    "NoiseContrastivePrior": "ncprior.priors",
    "Splits": "ncprior.data",
    "build_vae": "ncprior.vaes",
    "check_vae": "ncprior.vaes",
    "combine": "ncprior.training",
    "compare": "ncprior.comparison",
    "diagnose": "ncprior.diagnosis",
    "draw": "ncprior.generation",
    "draw_with_energy": "ncprior.vaebm",
    "evaluate": "ncprior.evaluation",
    "finetune_vae": "ncprior.training",
    "fit_energy": "ncprior.vaebm",
    "fit_prior": "ncprior.training",
    "generate": "ncprior.generation",
    "load_data": "ncprior.data",
    "load_vae": "ncprior.runs",
    "train_vae": "ncprior.training",
}

__all__ = [
    "NVAE",
    "Bernoulli",
    "Categorical",
    "FlatVAE",
    "Gaussian",
    "GaussianMixture",
    "ImageDataset",
    "ImageEnergy",
    "NoiseContrastivePrior",
    "Splits",
    "__version__",
    "build_vae",
    "check_vae",
    "combine",
    "compare",
    "diagnose",
    "draw",
    "draw_with_energy",
    "evaluate",
    "finetune_vae",
    "fit_energy",
    "fit_prior",
    "generate",
    "load_data",
    "load_vae",
    "train_vae",
]


def __getattr__(name: str) -> Any:
    """Import a public name where it is first used, so that the command line starts at once."""
    if name not in _HOME:
        raise AttributeError(f"module 'ncprior' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from ncprior.comparison import compare
    from ncprior.data import ImageDataset, Splits, load_data
    from ncprior.diagnosis import diagnose
    from ncprior.evaluation import evaluate
    from ncprior.generation import draw, generate
    from ncprior.priors import GaussianMixture, NoiseContrastivePrior
    from ncprior.runs import load_vae
    from ncprior.training import combine, finetune_vae, fit_prior, train_vae
    from ncprior.vaebm import ImageEnergy, draw_with_energy, fit_energy
    from ncprior.vaes import NVAE, Bernoulli, Categorical, FlatVAE, Gaussian, build_vae, check_vae
