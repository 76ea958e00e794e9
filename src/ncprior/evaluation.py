"""Scores of base prior, noise contrastive prior and others, on the same images and draws."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.figures import VAE_PRIOR, Figure, Figures, as_json, from_json, table
from ncprior.generation import AUTO, Draws, Pool
from ncprior.latent_figures import latent_figures
from ncprior.nll_figures import check_has_likelihood, measure_nll
from ncprior.priors import NoiseContrastivePrior
from ncprior.quality_figures import METRICS as QUALITY_METRICS
from ncprior.quality_figures import Spec, quality_figures, yardsticks
from ncprior.sources import Kept, Source, WithEnergy, reconstructions
from ncprior.storage import unpack_rows
from ncprior.terminal import as_text, warned

LATENT_METRICS = ("mmd", "c2st", "swd")
METRICS = ("nll", *QUALITY_METRICS, *LATENT_METRICS)
FEWEST_SAMPLES = 40


class Scores(dict[str, Figure]):
    """Figures by name, and what to be careful about; prints as a table with a column a source."""

    def __init__(self, figures: Figures, sources: Sequence[str], warnings: Sequence[str]) -> None:
        super().__init__(figures)
        self.sources, self.warnings = list(sources), list(warnings)

    def __str__(self) -> str:
        from rich.table import Table

        cells, rest = _by_source(self, self.sources)
        titles = [name.replace("_", " ") for name in self.sources]
        found = Table("figure", *titles, "unit", "samples")
        for column in found.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for stem, of_source in cells.items():
            first = next(iter(of_source.values()))
            texts = [
                f"{f.text()} {f.error()}" if (f := of_source.get(name)) else ""
                for name in self.sources
            ]
            found.add_row(stem.replace("_", " "), *texts, first.unit, f"{first.samples:,}")
        parts = [as_text(found)] if cells else []
        if rest:
            parts.append(as_text(table(rest)))
        return "\n".join([*parts, *map(warned, self.warnings)])


def evaluate(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    priors: Mapping[str, Any] | None = None,
    metrics: Sequence[str] = ("fd", "nll"),
    samples: int = 10_000,
    proposals: Pool = AUTO,
    images: int = 1000,
    importance_samples: int = 200,
    log_z_draws: int = 2_000_000,
    log_z_methods: Sequence[str] | None = None,
    features: Spec | None = None,
    classifier: Spec | None = None,
    seed: int = 0,
    directory: Path | None = None,
    resume: bool = False,
    progress: bool = False,
    **options: Any,
) -> Scores:
    """Measure the base prior, a noise contrastive prior and others by the same draws and images.

    Where the NCP stands on another base, the VAE's own prior is measured, too, under the name
    "vae_prior": the gap closed and the NLL's gain are counted from there.

    Args:
        vae: The VAE.
        prior: The noise contrastive prior, named "ncp"; None measures the base alone.
        data: The VAE's images, or a tensor (n, c, h, w) in [0, 1].
        splits: Which of them are for training, validation and test; 80/10/10 at random by default.
        priors: Further priors by name, of a flat VAE: densities or noise contrastive priors. Or
            any prior `WithEnergy`, which has samples but no likelihood: its Z is not known.
        metrics: "nll" (see `measure_nll`); "fd", "fd_infinity", "kid", "prdc", "near", "modes" (see
            `quality_figures`); "mmd", "c2st", "swd" (see `latent_figures`).
        samples: Images drawn from each prior and from the aggregate posterior.
        proposals: SIR's pool, or "auto"; see `draw`.
        images: Test images for the likelihood.
        importance_samples: Posterior draws for each of them.
        log_z_draws: Base draws for log Z.
        log_z_methods: How to estimate it: some of "base", "ais" and "bridge". By default all three
            for one latent group, and "base" for several, where a chain takes minutes.
        features: Feature space of the sample measures; see `load_features`.
        classifier: What tells classes, for "modes"; `features` if these do.
        seed: Seed of all that is drawn.
        directory: Where draws and finished figures are kept until all is done; nowhere by default.
        resume: Take up what an earlier call left there.
        progress: Show progress bars.
        options: Other arguments of `draw`, such as `sampler`.

    Raises:
        ValueError: an unknown metric, "nll" of an autoencoder, a count that is too small, or a
            prior for another VAE.
    """
    metrics = [metrics] if isinstance(metrics, str) else metrics
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        raise ValueError(
            f"metrics must be some of {', '.join(METRICS)}, got {', '.join(unknown) or 'none'}"
        )
    if "nll" in metrics:
        check_has_likelihood(vae)
    if samples < FEWEST_SAMPLES:
        raise ValueError(f"samples must be at least {FEWEST_SAMPLES}, got {samples}")
    if taken := {"base", "ncp", VAE_PRIOR, "reconstruction"} & set(priors or {}):
        raise ValueError(f"priors must have other names than {', '.join(sorted(taken))}")
    data, splits = as_data(data, splits, seed)
    for contrastive in _contrastive(prior, priors):
        contrastive.check_fitted_on(vae)
    quality = [name for name in metrics if name in QUALITY_METRICS]
    latents = [name for name in metrics if name in LATENT_METRICS]
    if quality:
        space, judge = yardsticks(quality, data, splits, features, classifier)
    kept = Kept(directory, resume=resume)
    identity = [Source.of(vae, p).identity() for p in (prior, *(priors or {}).values())]
    figures: Figures = {}
    warnings = [
        text
        for contrastive in _contrastive(prior, priors)
        for text in seen_test_images(contrastive, data, splits)
    ]
    warnings = list(dict.fromkeys(warnings))

    def add(name: str, settings: Any, measure: Callable[[], tuple[Figures, list[str]]]) -> None:
        with kept.answer(name, settings, identity, seed) as content:
            if not content:
                found, said = measure()
                content |= {"figures": as_json(found), "warnings": said}
            figures.update(from_json(content["figures"]))
            warnings.extend(content["warnings"])

    if "nll" in metrics:
        counts: dict[str, Any] = {
            "images": images,
            "importance_samples": importance_samples,
            "log_z_draws": log_z_draws,
            "log_z_methods": log_z_methods,
        }

        def likelihood() -> tuple[Figures, list[str]]:
            plain = {k: p for k, p in (priors or {}).items() if not isinstance(p, WithEnergy)}
            found = measure_nll(
                vae, data, splits, prior, others=plain, seed=seed, progress=progress, **counts
            )
            return found.figures, found.warnings

        add("likelihood", counts, likelihood)
    names = ["base", *(["ncp"] if prior is not None else []), *(priors or {})]
    if prior is not None and prior.has_other_base(vae):
        names.insert(0, VAE_PRIOR)
    if quality or latents:
        options |= {"proposals": proposals, "progress": progress}
        draws = draw_each(
            vae, prior, data, splits, samples, priors=priors, seed=seed, kept=kept, **options
        )
        names = list(draws)
        if quality:
            settings = [quality, str(features), str(classifier), samples]
            add("quality", settings, lambda: (quality_figures(
                draws, data, splits, metrics=quality, features=space, classifier=judge,
                seed=seed, progress=progress,
            ), []))  # fmt: skip
        if latents:
            add("latents", [latents, samples], lambda: (latent_figures(
                vae, prior, data, splits, draws, metrics=latents, seed=seed, progress=progress,
            ), []))  # fmt: skip
    kept.clear()
    return Scores(figures, names, warnings)


def _contrastive(
    prior: NoiseContrastivePrior | None, others: Mapping[str, Any] | None
) -> list[NoiseContrastivePrior]:
    return [p for p in (prior, *(others or {}).values()) if isinstance(p, NoiseContrastivePrior)]


def seen_test_images(prior: NoiseContrastivePrior, data: ImageDataset, splits: Splits) -> list[str]:
    """A warning if a prior was fitted on some of the test images, as far as it says."""
    record, seen = prior.record, 0
    if "rows" in record and record["data"] == data.digest():
        seen = int(torch.isin(splits.test, unpack_rows(record["rows"])).sum())
    if not seen:
        return []
    return [
        f"{seen:,} of the {len(splits.test):,} test images are among those that the prior was "
        "fitted on, which flatters its figures. Fit it with rows=splits.train, and pass the same "
        "splits here."
    ]


def draw_each(
    vae: Any,
    prior: NoiseContrastivePrior | None,
    data: ImageDataset,
    splits: Splits,
    samples: int,
    *,
    priors: Mapping[str, Any] | None = None,
    seed: int = 0,
    kept: Kept | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Draws]:
    """`samples` images from each of base, ncp (if there is one), others, and reconstruction.

    `options` are those of `draw`. The base is the one that the NCP stands on; if that is not the
    VAE's own prior, there are images of the latter, too, "vae_prior".
    """
    if samples < FEWEST_SAMPLES:
        raise ValueError(f"samples must be at least {FEWEST_SAMPLES}, got {samples}")
    kept = kept or Kept(None)
    under = vae if prior is None else prior.under(vae)
    sources = {}
    if prior is not None and prior.has_other_base(vae):
        sources[VAE_PRIOR] = Source(vae)
    sources["base"] = Source(under)
    if prior is not None:
        sources["ncp"] = Source(vae, prior)
    sources |= {name: Source.of(vae, other) for name, other in (priors or {}).items()}
    sources["reconstruction"] = reconstructions(vae, data, splits, seed)
    return {
        name: kept.draws(name, source, samples, seed=seed, progress=progress, **options)
        for name, source in sources.items()
    }


def _by_source(
    figures: Figures, sources: Sequence[str]
) -> tuple[dict[str, dict[str, Figure]], Figures]:
    """Figures named STEM_SOURCE by stem and source, and the others."""
    cells: dict[str, dict[str, Figure]] = {}
    rest: Figures = {}
    for name, figure in figures.items():
        source = next((s for s in sources if name.endswith(f"_{s}")), None)
        if name in ("nll_gain", "gap_closed"):
            cells.setdefault(name, {})["ncp"] = figure
        elif source is None or name.startswith("log_z_") or "_over_" in name:
            rest[name] = figure
        else:
            cells.setdefault(name.removesuffix(f"_{source}"), {})[source] = figure
    return cells, rest
