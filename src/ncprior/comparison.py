"""Priors side by side on one frozen VAE: fitted, sampled and measured alike, for several seeds."""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncprior.candidates import SCORES, Candidates, check_names
from ncprior.data import ImageDataset, Splits, as_data
from ncprior.figures import Figures, as_json, from_json
from ncprior.generation import AUTO, Pool
from ncprior.metrics.features import FeatureSpace
from ncprior.nll_figures import check_has_likelihood, measure_nll
from ncprior.numerics import stream
from ncprior.priors import NoiseContrastivePrior
from ncprior.quality_figures import METRICS, Spec, quality_figures, yardsticks
from ncprior.scoreboard import COLUMNS, Comparison, Score
from ncprior.sources import Kept, Source, reconstructions
from ncprior.storage import fingerprint, read_json, write_json
from ncprior.training.processes import check_device

TIMED = 500
"""Draws that the time per 1000 is taken from."""
RECONSTRUCTION = "reconstruction"
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
        resume: Take up what is there: priors that would be fitted in the same way now, to the same
            images, draws that are made, and the figures of priors that would be measured in the
            same way, so that another prior or seed costs itself alone.
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
    candidates = Candidates(
        vae, data, splits, fit=fit or {}, directory=directory, resume=resume, progress=progress
    )
    fits = {name: candidates.settings(name) for name in priors} | {RECONSTRUCTION: {}}
    asked = {
        "vae": fingerprint(vae), "data": candidates.images, "samples": samples,
        "proposals": proposals, "metrics": list(metrics), "images": images,
        "importance_samples": importance_samples, "slow_nll": slow_nll,
        "features": _identity(features),
    }  # fmt: skip
    draws = Kept(None if directory is None else directory / "kept", resume=resume)
    board: list[Score] = []
    figures: Figures = {}
    pictures: dict[str, Tensor] = {}
    for seed in range(seeds):
        fitted = candidates.fitted(priors, seed)
        known = _known(fits, seed, asked, directory if resume else None)
        unknown = {name: prior for name, (prior, _) in fitted.items() if name not in known}
        known |= _measured(
            vae, unknown, data, splits, draws, seed, RECONSTRUCTION not in known, asked, space,
            progress,
        )  # fmt: skip
        if directory is not None:
            for name in [*unknown, RECONSTRUCTION]:
                _keep(directory / f"{name}-{seed}", known[name], asked | {"fit": fits[name]})
        board += [
            Score(name, seed, _values(name, known, prior, seconds))
            for name, (prior, seconds) in fitted.items()
        ]
        found = {key: figure for of in known.values() for key, figure in of.figures.items()}
        figures |= {f"{name}_seed{seed}": figure for name, figure in found.items()}
        if not pictures:
            shown = {name: known[name].picture for name in fits}
            pictures = {name: images for name, images in shown.items() if images is not None}
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
    fits: dict[str, Any], seed: int, asked: dict[str, Any], directory: Path | None
) -> dict[str, _Measured]:
    """What was measured of these as it is asked for, and fitted as it would be now."""
    found: dict[str, _Measured] = {}
    if directory is None:
        return found
    for name, fit in fits.items():
        file = directory / f"{name}-{seed}" / SCORES
        content = read_json(file) if file.exists() else None
        if content is None or content["asked"] != json.loads(json.dumps(asked | {"fit": fit})):
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
