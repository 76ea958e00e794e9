"""Priors on disk and on the hub: config.json + model.safetensors."""

from pathlib import Path
from typing import Any

from ncprior.normal import StandardNormal
from ncprior.numerics import LogZ
from ncprior.priors.autoregressive import AutoregressivePrior
from ncprior.priors.diffusion import DiffusionPrior
from ncprior.priors.energy import EnergyPrior
from ncprior.priors.fitting import first_weights
from ncprior.priors.flow import FlowPrior
from ncprior.priors.lars import LARSPrior
from ncprior.priors.mixture import GaussianMixture
from ncprior.priors.snis import SNISPrior
from ncprior.priors.two_stage import TwoStagePrior
from ncprior.priors.vamp import VampPrior
from ncprior.ratios import (
    NETWORKS,
    CombinedRatio,
    MatchedRatio,
    ReencodedRatio,
    SummedRatio,
    UnitRatio,
)
from ncprior.storage import load_tensors, restore, save_tensors

FORMAT = 2
DENSITY_FORMAT = 1
BASES: dict[str, Any] = {
    "gaussian": StandardNormal,
    "mixture": GaussianMixture,
    "vamp": VampPrior,
    "flow": FlowPrior,
    "autoregressive": AutoregressivePrior,
    "two-stage": TwoStagePrior,
    "diffusion": DiffusionPrior,
    "lars": LARSPrior,
    "snis": SNISPrior,
    "ebm": EnergyPrior,
}


def save_prior(prior: Any, directory: Path) -> None:
    """Write a prior into `directory`. Raises TypeError for a base or ratio that is not ours."""
    log_z = None if prior.log_z is None else prior.log_z._asdict()
    config = {
        "format": FORMAT,
        "class": "NoiseContrastivePrior",
        "ratios": [_ratio_config(ratio) for ratio in prior.ratios],
        "base": None if prior.base is None else _base_config(prior.base),
        "log_z": log_z,
        "record": prior.record,
    }
    save_tensors(directory, config, prior.state_dict())


def load_prior(cls: type, directory: Path) -> Any:
    """Read what `save_prior` wrote."""
    config, tensors = load_tensors(directory)
    if not isinstance(config, dict):
        raise ValueError(f"{directory}/config.json is not that of a prior; fit it anew")
    if config.get("format") != FORMAT or config.get("class") != "NoiseContrastivePrior":
        raise ValueError(
            f"{directory}/config.json is not a noise contrastive prior of format {FORMAT} "
            f"(found class {config.get('class')!r}, format {config.get('format')!r}); fit it anew"
        )
    try:
        prior = _from_config(cls, config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory}/config.json is not one that this version reads "
            f"({type(error).__name__}: {error}); fit it anew"
        ) from None
    restore(prior, tensors, directory)
    return prior.eval().requires_grad_(False)


def save_density(prior: Any, directory: str | Path) -> None:
    """Write a prior of `BASES` into `directory`.

    Raises:
        TypeError: a class that is not ours, a noise contrastive prior included (it has a
            `save_pretrained` of its own).
    """
    config = {"format": DENSITY_FORMAT, "class": "density"} | _base_config(prior)
    save_tensors(Path(directory), config, prior.state_dict())


def load_density(directory: str | Path) -> Any:
    """Read what `save_density` wrote; in evaluation mode, without gradients.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files that are damaged, of another class or format, or that disagree.
    """
    directory = Path(directory)
    config, tensors = load_tensors(directory)
    if not isinstance(config, dict) or config.pop("class", None) != "density":
        raise ValueError(f"{directory}/config.json is not that of a density; fit it anew")
    if config.pop("format", None) != DENSITY_FORMAT:
        raise ValueError(
            f"{directory}/config.json is not of format {DENSITY_FORMAT}; fit the prior anew"
        )
    try:
        prior = _base(config)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{directory}/config.json is not one that this version reads "
            f"({type(error).__name__}: {error}); fit it anew"
        ) from None
    restore(prior, tensors, directory)
    return prior.eval().requires_grad_(False)


def _from_config(cls: type, config: dict[str, Any]) -> Any:
    ratios = [_ratio(options) for options in config["ratios"]]
    base = None if config["base"] is None else _base(config["base"])
    log_z = None if config["log_z"] is None else LogZ(**config["log_z"])
    prior = cls(ratios, base, log_z=log_z)
    prior.record = config["record"]
    return prior


def _base(options: dict[str, Any]) -> Any:
    """A density of `BASES` with fresh weights from its config."""
    with first_weights(0):  # thrown away
        return BASES[options.pop("kind")](**options)


def _ratio(options: dict[str, Any]) -> Any:
    """A ratio with fresh weights from its config."""
    name = options.pop("network")
    if name == "summed":
        return SummedRatio([_ratio(part) for part in options["parts"]])
    if name == "matched":
        return MatchedRatio(_ratio(options["of"]))
    if name == "combined":
        options["ratios"] = [_ratio(part) for part in options["ratios"]]
        options["bases"] = [_base(part) for part in options["bases"]]
        return CombinedRatio(**options)
    if name == "reencoded":
        return ReencodedRatio(_ratio(options["of"]), options["latent_size"])
    return UnitRatio() if name == "unit" else NETWORKS[name](**options)


def _ratio_config(ratio: Any) -> dict[str, Any]:
    if not isinstance(ratio, CombinedRatio):
        return _config(ratio, "a ratio")
    return {
        "network": "combined",
        "ratios": [_ratio_config(part) for part in ratio.ratios],
        "bases": [_base_config(part) for part in ratio.bases],
        "places": list(ratio.places),
        "latent_size": ratio.latent_shape[0],
        "mean": ratio.mean,
    }


def _config(module: Any, what: str) -> dict[str, Any]:
    config = getattr(module, "config", None)
    if config is None:
        raise TypeError(f"{what} of class {type(module).__name__} has no config to save it by")
    return dict(config)


def _base_config(base: Any) -> dict[str, Any]:
    for kind, known in BASES.items():
        if isinstance(base, known):
            return {"kind": kind} | _config(base, "a base")
    raise TypeError(f"a base of class {type(base).__name__} cannot be saved yet")
