"""Priors side by side on one frozen VAE: fitted, sampled and measured alike, for several seeds."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.figures import Figures, as_json, from_json
from ncprior.generation import AUTO, Pool
from ncprior.metrics.features import FeatureSpace
from ncprior.nll_figures import check_has_likelihood, measure_nll
from ncprior.numerics import stream
from ncprior.priors import PRIORS, Codes, NoiseContrastivePrior, fit_density, parse_name
from ncprior.priors.pretrained import load_density, save_density
from ncprior.quality_figures import METRICS, Spec, quality_figures, yardsticks
from ncprior.recipes import suggestion
from ncprior.scoreboard import COLUMNS, Comparison, Score
from ncprior.sources import Kept, Source, reconstructions, training_images
from ncprior.storage import fingerprint, read_json, write_json
from ncprior.training import combine, fit_prior
from ncprior.training.bases import codes_of
from ncprior.training.processes import check_device
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
TIMED = 500
"""Draws that the time per 1000 is taken from."""
RECONSTRUCTION = "reconstruction"
SCORES = "scores.json"
PICTURED = 10
"""Images of each prior in the picture."""


def compare(
    vae: Any,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    priors: Sequence[str] = ("gaussian", "mixture", "ncp"),
    seeds: int = 5,
    samples: int = 10_000,
    proposals: Pool = AUTO,
    metrics: Sequence[str] = ("nll", "fd", "kid", "prdc"),
    images: int = 1000,
    importance_samples: int = 100,
    slow_nll: bool = False,
    features: Spec | None = None,
    fit: dict[str, Any] | None = None,
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = False,
) -> Comparison:
    """Fit each prior on the frozen VAE with each seed, and measure all of them alike.

    Args:
        vae: A VAE with one latent group, which is not changed.
        data: Its images, or a tensor (n, c, h, w) in [0, 1].
        splits: Which of them are for training (priors are fitted on these), validation and test;
            80/10/10 at random by default.
        priors: Names: those that `parse_name` knows, "ncp", "ncp-multistage", "ncp-reencoded" and
            "ncp-BASE" or "ncp-reencoded-BASE", such as "ncp-mixture-100"; "A+B" is the weighted
            mean of A and B (`combine`, by the validation images).
        seeds: Seeds 0 up to this; each fits and samples anew.
        samples: Images drawn from each prior and from the aggregate posterior.
        proposals: SIR's pool for noise contrastive priors, or "auto"; see `draw`.
        metrics: "nll" and what `quality_figures` takes.
        images: Test images for the NLL.
        importance_samples: Posterior draws for each, the same for all priors.
        slow_nll: Take the NLL also of priors that solve an equation for the density of each latent
            (diffusion): an hour where the others take minutes.
        features: Feature space of the sample measures; see `load_features`.
        fit: Arguments of `fit_prior` for all noise contrastive priors.
        directory: Where fitted priors and scores are kept; nowhere by default.
        resume: Take up what is there: priors that are fitted, draws that are made, and the figures
            of priors that were measured in the same way, so that another prior or seed costs
            itself alone.
        progress: Show progress bars.

    Raises:
        ValueError: an unknown prior, a count below 1, or a hierarchical VAE.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    priors = [priors] if isinstance(priors, str) else priors
    _check(vae, priors, seeds, samples, metrics)
    check_device((fit or {}).get("device", "auto"))
    if "nll" in metrics:
        check_has_likelihood(vae)
    data, splits = as_data(data, splits, 0)
    quality = [metric for metric in metrics if metric != "nll"]
    space = yardsticks(quality, data, splits, features)[0] if quality else None
    codes = codes_of(vae, data, splits.train, generator=stream(0, "codes"), device=device_of(vae))
    asked = {
        "vae": fingerprint(vae), "fit": fit or {}, "samples": samples, "proposals": proposals,
        "metrics": list(metrics), "images": images, "importance_samples": importance_samples,
        "slow_nll": slow_nll, "features": _identity(features),
    }  # fmt: skip
    draws = Kept(None if directory is None else directory / "kept", resume=resume)
    board: list[Score] = []
    figures: Figures = {}
    pictures: dict[str, Tensor] = {}
    for seed in range(seeds):
        fitted: dict[str, tuple[Any, float]] = {}
        for name in [each for wanted in priors for each in (*parts_of(wanted), wanted)]:
            if name not in fitted:
                fitted[name] = _fitted(
                    name, fitted, vae, data, splits, codes, seed, fit or {}, directory, resume,
                    progress,
                )  # fmt: skip
        fitted = {name: fitted[name] for name in priors}
        known = _known([*priors, RECONSTRUCTION], seed, asked, directory if resume else None)
        unknown = {name: prior for name, (prior, _) in fitted.items() if name not in known}
        known |= _measured(
            vae, unknown, data, splits, draws, seed, RECONSTRUCTION not in known, asked, space,
            progress,
        )  # fmt: skip
        if directory is not None:
            for name in [*unknown, RECONSTRUCTION]:
                _keep(directory / f"{name}-{seed}", known[name], asked)
        board += [
            Score(name, seed, _values(name, known, prior, seconds))
            for name, (prior, seconds) in fitted.items()
        ]
        found = {key: figure for of in known.values() for key, figure in of.figures.items()}
        figures |= {f"{name}_seed{seed}": figure for name, figure in found.items()}
        if not pictures:
            pictures = {name: of.picture for name, of in known.items() if of.picture is not None}
    draws.clear()
    return Comparison(board, figures, pictures)


class _Measured(NamedTuple):
    """What is known of one prior with one seed, or of reconstructions."""

    figures: Figures  # their names end in that of the prior
    seconds: float | None = None  # that 1000 draws take
    picture: Tensor | None = None  # a few images


def _measured(
    vae: Any,
    priors: dict[str, Any],
    data: ImageDataset,
    splits: Splits,
    kept: Kept,
    seed: int,
    reconstruct: bool,
    asked: dict[str, Any],
    space: FeatureSpace | None,
    progress: bool,
) -> dict[str, _Measured]:
    """Samples and likelihoods of some priors; the figures of each do not depend on the others."""
    quality = [metric for metric in asked["metrics"] if metric != "nll"]
    names = [*priors, *[RECONSTRUCTION] * reconstruct]
    found: Figures = {}
    images: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    if quality and names:
        sources = {name: Source.of(vae, prior) for name, prior in priors.items()}
        if reconstruct:
            sources[RECONSTRUCTION] = reconstructions(vae, data, splits, seed)
        images, seconds = _samples(
            sources, asked["samples"], asked["proposals"], seed, kept, progress
        )
        found |= quality_figures(
            images, data, splits, metrics=quality, features=space, seed=seed, progress=progress
        )
    dense = {
        name: prior for name, prior in priors.items() if asked["slow_nll"] or not _is_slow(prior)
    }
    if "nll" in asked["metrics"] and dense:
        found |= _likelihoods(
            vae, dense, data, splits, images=asked["images"],
            importance_samples=asked["importance_samples"], seed=seed, progress=progress,
        )  # fmt: skip
    return {
        name: _Measured(
            {key: figure for key, figure in found.items() if key.endswith(f"_{name}")},
            seconds.get(name),
            images[name][:PICTURED] if name in images and seed == 0 else None,
        )
        for name in names
    }


def _values(
    name: str, known: dict[str, _Measured], prior: Any, fit_seconds: float
) -> dict[str, float]:
    """The cells of a row of the table."""
    own = known[name]
    values = {
        column.name: own.figures[f"{column.name}_{name}"].value
        for column in COLUMNS
        if f"{column.name}_{name}" in own.figures
    }
    if "gaussian" in known and "fd" in values:
        base, best = (
            known[other].figures[f"fd_{other}"].value for other in ("gaussian", RECONSTRUCTION)
        )
        values["gap_closed"] = (base - values["fd"]) / (base - best)
    if own.seconds is not None:
        values["seconds_per_1000"] = own.seconds
    return values | {"fit_seconds": fit_seconds, "parameters": _numbers(prior)}


def _known(
    names: Sequence[str], seed: int, asked: dict[str, Any], directory: Path | None
) -> dict[str, _Measured]:
    """What was measured of these as it is asked for now."""
    found: dict[str, _Measured] = {}
    if directory is None:
        return found
    for name in names:
        file = directory / f"{name}-{seed}" / SCORES
        content = read_json(file) if file.exists() else None
        if content is None or content["asked"] != json.loads(json.dumps(asked)):
            continue
        picture = content["picture"] and torch.tensor(content["picture"], dtype=torch.float32)
        found[name] = _Measured(from_json(content["figures"]), content["seconds"], picture)
    return found


def _keep(where: Path, measured: _Measured, asked: dict[str, Any]) -> None:
    content = {"asked": asked, "seconds": measured.seconds, "figures": as_json(measured.figures)}
    picture = None if measured.picture is None else measured.picture.tolist()
    write_json(where / SCORES, content | {"picture": picture})


def _identity(features: Spec | None) -> str:
    """What tells feature spaces apart; networks by their weights."""
    return fingerprint(features) if isinstance(features, nn.Module) else str(features or "")


def _check(
    vae: Any, priors: Sequence[str], seeds: int, samples: int, metrics: Sequence[str]
) -> None:
    if vae.num_groups != 1:
        raise ValueError(
            f"compare needs a VAE with one latent group, this one has {vae.num_groups}; its own "
            "prior and the NCP are compared by ncprior evaluate"
        )
    check_names(priors)
    unknown = [name for name in metrics if name not in ("nll", *METRICS)]
    if unknown or not metrics:
        raise ValueError(
            f"metrics must be some of nll, {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}"
        )
    if seeds < 1 or samples < 40:
        raise ValueError(
            f"seeds must be at least 1 and samples at least 40, got {seeds} and {samples}"
        )


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


def _fitted(
    name: str,
    fitted: dict[str, tuple[Any, float]],
    vae: Any,
    data: ImageDataset,
    splits: Splits,
    codes: Codes,
    seed: int,
    fit: dict[str, Any],
    directory: Path | None,
    resume: bool,
    progress: bool,
) -> tuple[Any, float]:
    """A prior and the seconds that its fit took, from disk if it is there and of this VAE.

    One that is combined from others needs these in `fitted`; its seconds include theirs.
    """
    if directory is not None and resume:
        known = load_fitted(directory, name, seed, vae, fit)
        if known is not None:
            return known
    began = time.perf_counter()
    prior: Any
    own, parts = ratio_options(name), parts_of(name)
    if parts:
        prior = combine(
            vae, [fitted[part][0] for part in parts], data, rows=splits.validation, names=parts,
            seed=seed, progress=progress, device=(fit or {}).get("device", "auto"),
        )  # fmt: skip
    elif own is not None:
        options = {"seed": seed, "progress": progress, "tensorboard": False} | fit | own
        prior = fit_prior(vae, data, rows=splits.train, **options)
    else:
        with progress_bar(f"fitting {name}, seed {seed}", 1, shown=progress) as bar:
            starts = training_images(data, splits, seed) if name == "vamp" else None
            prior = fit_density(name, codes, vae=vae, images=starts, seed=seed)
            bar(1)
    seconds = time.perf_counter() - began + sum(fitted[part][1] for part in parts)
    if directory is not None:
        where = directory / f"{name}-{seed}"
        if isinstance(prior, NoiseContrastivePrior):
            prior.save_pretrained(where)
        else:
            save_density(prior, where)
        write_json(where / "fit.json", {"vae": fingerprint(vae), "fit": fit, "seconds": seconds})
    return prior, seconds


def load_fitted(
    directory: Path, name: str, seed: int, vae: Any, fit: dict[str, Any] | None = None
) -> tuple[Any, float] | None:
    """A prior that `compare` kept and the seconds of its fit; None if it is not there or not so."""
    where = directory / f"{name}-{seed}"
    if not (where / "fit.json").exists():
        return None
    known = read_json(where / "fit.json")
    if known["vae"] != fingerprint(vae) or (fit is not None and known["fit"] != fit):
        return None
    if ratio_options(name) is None and not parts_of(name):
        return load_density(where), known["seconds"]
    return NoiseContrastivePrior.from_pretrained(where, vae=vae), known["seconds"]


def _samples(
    sources: dict[str, Source],
    samples: int,
    proposals: Pool,
    seed: int,
    kept: Kept,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images of each source, and the seconds that 1000 of them take."""
    found, seconds = {}, {}
    for name, source in sources.items():
        options: dict[str, Any] = {"seed": seed, "proposals": proposals}
        found[name] = kept.draws(name, source, samples, progress=progress, **options).images
        began = time.perf_counter()  # draws that were kept took no time just now
        Kept(None).draws(name, source, TIMED, progress=False, **options)
        seconds[name] = (time.perf_counter() - began) * 1000 / TIMED
    return found, seconds


class _Bounded(NamedTuple):
    """A prior that has a bound below its log-density only."""

    log_prob: Callable[[Tensor], Tensor]


def _likelihoods(
    vae: Any, priors: dict[str, Any], data: ImageDataset, splits: Splits, **options: Any
) -> Figures:
    """NLL of each prior that has a density, or a bound of one; log Z's error in its own."""
    seed = options["seed"]
    named = {name: _density(prior, seed) for name, prior in priors.items()}
    densities = {f"prior {name}": known for name, known in named.items() if known is not None}
    found = measure_nll(vae, data, splits, others=densities, **options).figures
    figures = {
        f"nll_{name}": found[f"nll_prior {name}"]
        for name, known in named.items()
        if known is not None
    }
    for name, prior in priors.items():
        if isinstance(prior, NoiseContrastivePrior) and named[name] is not None:
            nll, z = figures[f"nll_{name}"], prior.log_z
            assert z is not None
            figures[f"nll_{name}"] = nll._replace(se=math.hypot(nll.se or 0, z.se))
    return figures


def _is_slow(prior: Any) -> bool:
    """Whether an equation is solved for the density of each latent."""
    return any(
        getattr(density, "slow_density", False) for density in (prior, getattr(prior, "base", None))
    )


def _density(prior: Any, seed: int) -> Any:
    """What has `log_prob`, normalised or a bound; None for a prior without either."""
    if isinstance(prior, NoiseContrastivePrior):
        return prior if prior.log_z is not None and hasattr(prior.base, "log_prob") else None
    if prior.normalized:
        return prior
    if hasattr(prior, "log_prob_bound"):
        generator = stream(seed, "density bounds")
        return _Bounded(lambda z: prior.log_prob_bound(z, generator=generator))
    return None


def _numbers(prior: Any) -> float:
    """How many numbers a prior keeps: parameters and buffers, its base's included."""
    parts: list[nn.Module] = [prior]
    if isinstance(prior, NoiseContrastivePrior) and isinstance(prior.base, nn.Module):
        parts.append(prior.base)
    tensors = {id(t): t for part in parts for t in part.state_dict().values()}
    return float(sum(tensor.numel() for tensor in tensors.values()))
