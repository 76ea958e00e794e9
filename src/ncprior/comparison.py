"""Priors side by side on one frozen VAE: fitted, sampled and measured alike, for several seeds."""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ncprior.data import ImageDataset, Splits, as_data
from ncprior.figures import Figures, as_json, as_text, from_json
from ncprior.nll_figures import measure_nll
from ncprior.numerics import stream
from ncprior.priors import PRIORS, Codes, NoiseContrastivePrior, fit_density
from ncprior.priors.pretrained import load_density, save_density
from ncprior.quality_figures import Spec, quality_figures
from ncprior.sources import Kept, Source, reconstructions, training_images
from ncprior.storage import fingerprint, read_json, write_json
from ncprior.training import fit_prior
from ncprior.training.evidence import encode
from ncprior.training.progress import progress_bar
from ncprior.walk import device_of, evaluating

RATIOS: dict[str, dict[str, Any]] = {
    "ncp": {},
    "ncp-mixture": {"base": "mixture"},
    "ncp-multistage": {"stages": "adaptive"},
}
"""Noise contrastive priors by name, as arguments of `fit_prior`."""
SAMPLERS = {"ncp-multistage": "annealed"}
"""What noise contrastive priors are drawn by; SIR where it is not said."""
COMPARED = (*PRIORS, *RATIOS)
TIMED = 500
"""Draws that the time per 1000 is taken from."""
T_95 = (math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a 95 % interval, by degrees of freedom; 2 beyond."""


class Column(NamedTuple):
    """A column of the table: a figure, and which way is better."""

    name: str
    title: str
    better: int  # 1 for more, -1 for less, 0 where nobody says


COLUMNS = (
    Column("nll", "NLL (nats)", -1),
    Column("fd", "FD", -1),
    Column("gap_closed", "gap closed", 1),
    Column("kid", "KID", -1),
    Column("precision", "precision", 1),
    Column("recall", "recall", 1),
    Column("fit_seconds", "fit (s)", 0),
    Column("seconds_per_1000", "1000 draws (s)", 0),
    Column("parameters", "numbers kept", 0),
)


class Score(NamedTuple):
    """What was measured of one prior with one seed."""

    prior: str
    seed: int
    values: dict[str, float]  # by the names of `COLUMNS`; NLL only where there is a density


class Comparison(NamedTuple):
    """Scores of priors on the same VAE, samples and images; prints as a table."""

    scores: list[Score]
    figures: Figures  # of each prior and seed, with their errors
    pictures: dict[str, Tensor]  # a few images of each source, of the first seed

    def table(self) -> list[list[str]]:
        """Header and rows of text; the best is marked ** where it is so beyond the intervals."""
        names = list(dict.fromkeys(score.prior for score in self.scores))
        shown = [c for c in COLUMNS if any(c.name in s.values for s in self.scores)]
        columns = [_column(self._values(column.name, names), column) for column in shown]
        return [
            ["prior", *(column.title for column in shown)],
            *([name, *cells] for name, *cells in zip(names, *columns, strict=True)),
        ]

    def markdown(self) -> str:
        """The table in Markdown."""
        header, *rows = self.table()
        lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
        return "\n".join(lines) + "\n"

    def __str__(self) -> str:
        from rich.table import Table

        header, *rows = self.table()
        found = Table()
        for i, title in enumerate(header):
            found.add_column(title, justify="right" if i else "left")
        for row in rows:
            found.add_row(*row)
        return as_text(found, width=160) + f"\n{self.legend()}"

    def legend(self) -> str:
        """How to read the table."""
        seeds = len({score.seed for score in self.scores})
        if seeds == 1:
            return "One seed: no intervals, and nothing is marked as best."
        return f"{seeds} seeds; ± is half a 95 % interval; the best is marked where beyond them."

    def _values(self, column: str, names: Sequence[str]) -> list[dict[int, float]]:
        return [
            {
                s.seed: s.values[column]
                for s in self.scores
                if s.prior == name and column in s.values
            }
            for name in names
        ]


def compare(
    vae: Any,
    data: ImageDataset | Tensor,
    splits: Splits | None = None,
    *,
    priors: Sequence[str] = ("gaussian", "mixture", "ncp"),
    seeds: int = 5,
    samples: int = 10_000,
    proposals: int = 1000,
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
        priors: Names in `COMPARED`.
        seeds: Seeds 0 up to this; each fits and samples anew.
        samples: Images drawn from each prior and from the aggregate posterior.
        proposals: SIR's pool for noise contrastive priors.
        metrics: "nll" and what `quality_figures` takes.
        images: Test images for the NLL.
        importance_samples: Posterior draws for each, the same for all priors.
        slow_nll: Take the NLL also of priors that solve an equation for the density of each latent
            (diffusion): an hour where the others take minutes.
        features: Feature space of the sample measures; see `load_features`.
        fit: Arguments of `fit_prior` for all noise contrastive priors.
        directory: Where fitted priors and scores are kept; nowhere by default.
        resume: Take up what is there.
        progress: Show progress bars.

    Raises:
        ValueError: an unknown prior, a count below 1, or a hierarchical VAE.
    """
    _check(vae, priors, seeds, samples)
    data, splits = as_data(data, splits, 0)
    kept = Kept(None if directory is None else directory / "kept", resume=resume)
    codes = _codes(vae, data, splits)
    scores: list[Score] = []
    figures: Figures = {}
    pictures: dict[str, Tensor] = {}
    quality = [metric for metric in metrics if metric != "nll"]
    for seed in range(seeds):
        fitted = {
            name: _fitted(name, vae, data, splits, codes, seed, fit or {}, directory, resume,
                          progress)
            for name in priors
        }  # fmt: skip
        found: Figures = {}
        if quality:
            images_of, seconds = _samples(
                vae, {name: prior for name, (prior, _) in fitted.items()}, data, splits, samples,
                proposals, seed, kept, progress,
            )  # fmt: skip
            found |= quality_figures(
                images_of, data, splits, metrics=quality, features=features, seed=seed,
                progress=progress,
            )  # fmt: skip
            if not pictures:
                pictures = {name: part[:10] for name, part in images_of.items()}
        if "nll" in metrics:
            known = {
                name: prior
                for name, (prior, _) in fitted.items()
                if slow_nll or not getattr(prior, "slow_density", False)
            }
            found |= _likelihoods(
                vae, known, data, splits, images=images, importance_samples=importance_samples,
                seed=seed, progress=progress,
            )  # fmt: skip
        for name, (prior, fit_seconds) in fitted.items():
            values = {
                column.name: found[f"{column.name}_{name}"].value
                for column in COLUMNS
                if f"{column.name}_{name}" in found
            }
            if {f"fd_{n}" for n in ("gaussian", name, "reconstruction")} <= {*found}:
                base, own, best = (
                    found[f"fd_{n}"].value for n in ("gaussian", name, "reconstruction")
                )
                values["gap_closed"] = (base - own) / (base - best)
            if quality:
                values["seconds_per_1000"] = seconds[name]
            values["fit_seconds"] = fit_seconds
            values["parameters"] = _numbers(prior)
            scores.append(Score(name, seed, values))
        figures |= {f"{name}_seed{seed}": figure for name, figure in found.items()}
    kept.clear()
    return Comparison(scores, figures, pictures)


def _check(vae: Any, priors: Sequence[str], seeds: int, samples: int) -> None:
    if vae.num_groups != 1:
        raise ValueError(
            f"compare needs a VAE with one latent group, this one has {vae.num_groups}; its own "
            "prior and the NCP are compared by ncprior evaluate"
        )
    unknown = [name for name in priors if name not in COMPARED]
    if unknown or not priors:
        raise ValueError(
            f"priors must be some of {', '.join(COMPARED)}, got {', '.join(unknown) or 'none'}"
        )
    if seeds < 1 or samples < 40:
        raise ValueError(
            f"seeds must be at least 1 and samples at least 40, got {seeds} and {samples}"
        )


def _codes(vae: Any, data: ImageDataset, splits: Splits) -> Codes:
    with evaluating(vae):
        evidence = encode(
            vae, data, splits.train, generator=stream(0, "codes"), device=device_of(vae)
        )
    return Codes(*evidence)


def _fitted(
    name: str,
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
    """A prior and the seconds that its fit took, from disk if it is there and of this VAE."""
    if directory is not None and resume:
        known = load_fitted(directory, name, seed, vae, fit)
        if known is not None:
            return known
    began = time.perf_counter()
    prior: Any
    if name in RATIOS:
        options = {"seed": seed, "progress": progress, "tensorboard": False} | fit | RATIOS[name]
        prior = fit_prior(vae, data, rows=splits.train, **options)
    else:
        with progress_bar(f"fitting {name}, seed {seed}", 1, shown=progress) as bar:
            starts = training_images(data, splits, seed) if name == "vamp" else None
            prior = fit_density(name, codes, vae=vae, images=starts, seed=seed)
            bar(1)
    seconds = time.perf_counter() - began
    if directory is not None:
        where = directory / f"{name}-{seed}"
        if name in RATIOS:
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
    reader = NoiseContrastivePrior.from_pretrained if name in RATIOS else load_density
    return reader(where), known["seconds"]


def _samples(
    vae: Any,
    priors: dict[str, Any],
    data: ImageDataset,
    splits: Splits,
    samples: int,
    proposals: int,
    seed: int,
    kept: Kept,
    progress: bool,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Images of each prior and of reconstructions, and the seconds that 1000 of them take."""
    sources = {name: Source.of(vae, prior) for name, prior in priors.items()}
    sources["reconstruction"] = reconstructions(vae, data, splits, seed)
    found, seconds = {}, {}
    for name, source in sources.items():
        options: dict[str, Any] = {"seed": seed, "proposals": proposals}
        options["sampler"] = SAMPLERS.get(name, "sir")
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


def _density(prior: Any, seed: int) -> Any:
    """What has `log_prob`, normalised or a bound; None for a prior without either."""
    if isinstance(prior, NoiseContrastivePrior):
        return None if prior.log_z is None else prior
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


def _column(values: Sequence[dict[int, float]], column: Column) -> list[str]:
    """The cells of a column: means and half intervals over seeds."""
    best = _best(values, column.better)
    return [
        "" if not of_seeds else f"**{_cell(of_seeds)}**" if i == best else _cell(of_seeds)
        for i, of_seeds in enumerate(values)
    ]


def _cell(of_seeds: dict[int, float]) -> str:
    half = _half_interval(of_seeds.values())
    mean = sum(of_seeds.values()) / len(of_seeds)
    if mean and abs(mean) >= 1000:
        return f"{mean:,.0f}"
    if not math.isfinite(half):
        return f"{mean:.3g}"
    digits = 0 if half <= 0 else min(5, max(0, 1 - math.floor(math.log10(half))))
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if half else f"{mean:.3g}"


def _best(values: Sequence[dict[int, float]], better: int) -> int | None:
    """The entry that beats each other one by more than the interval of paired differences."""
    known = [i for i, of_seeds in enumerate(values) if of_seeds]
    if not better or len(known) < 2:
        return None
    mean = lambda of_seeds: sum(of_seeds.values()) / len(of_seeds)
    best = max(known, key=lambda i: better * mean(values[i]))
    for i in known:
        if i == best:
            continue
        shared = values[best].keys() & values[i].keys()
        gains = [better * (values[best][s] - values[i][s]) for s in shared]
        half = _half_interval(gains)
        if not math.isfinite(half) or sum(gains) / len(gains) <= half:
            return None
    return best


def _half_interval(values: Iterable[float]) -> float:
    """Half of the 95 % interval of a mean over seeds; NaN for one seed."""
    found = torch.tensor(list(values), dtype=torch.float64)
    if len(found) < 2:
        return math.nan
    t = T_95[len(found) - 1] if len(found) <= len(T_95) else 2.0
    return t * float(found.std()) / math.sqrt(len(found))


def save_comparison(comparison: Comparison, directory: Path) -> None:
    """Write comparison.json into `directory`."""
    scores = [score._asdict() for score in comparison.scores]
    content = {"scores": scores, "figures": as_json(comparison.figures)}
    write_json(directory / "comparison.json", content)


def load_comparison(directory: Path) -> Comparison:
    """Read what `save_comparison` wrote, without the pictures."""
    content = read_json(directory / "comparison.json")
    scores = [Score(**score) for score in content["scores"]]
    return Comparison(scores, from_json(content["figures"]), {})
