"""The table that a comparison of priors prints, and the scores behind it on disk."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.figures import Figures, as_json, from_json
from ncprior.storage import read_json, write_json
from ncprior.terminal import as_text, wrapped

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

    def table(self, mark: str = "**{}**") -> list[list[str]]:
        """Header and rows of text; the best is marked where it is so beyond the intervals."""
        names = list(dict.fromkeys(score.prior for score in self.scores))
        shown = [c for c in COLUMNS if any(c.name in s.values for s in self.scores)]
        columns = [_column(self._values(column.name, names), column, mark) for column in shown]
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
        return self.text()

    def text(self, *, styled: bool = False) -> str:
        """Table and legend; the best in bold, by a terminal's codes, if `styled`, else with a *."""
        from rich.table import Table

        header, *rows = self.table("[bold]{}[/bold]" if styled else "{}*")
        found = Table()
        for i, title in enumerate(header):
            found.add_column(title, justify="right" if i else "left", no_wrap=True)
        for row in rows:
            found.add_row(*row)
        legend = self.legend("Bold" if styled else "Marked *")
        return f"{as_text(found, styled=styled)}\n{wrapped(legend)}"

    def legend(self, marked: str = "Bold") -> str:
        """How to read the table, the best of which is `marked`."""
        seeds = len({score.seed for score in self.scores})
        if seeds == 1:
            return "One seed: no intervals, and nothing is marked as best."
        few = f" Two seeds give very wide intervals (t={T_95[1]:.1f})." if seeds == 2 else ""
        return (
            f"{seeds} seeds; ± is half a 95 % interval.{few} {marked}: the best, where that of its "
            "differences from every other prior, paired by seed, leaves out 0."
        )

    def _values(self, column: str, names: Sequence[str]) -> list[dict[int, float]]:
        return [
            {
                s.seed: s.values[column]
                for s in self.scores
                if s.prior == name and column in s.values
            }
            for name in names
        ]


def _column(values: Sequence[dict[int, float]], column: Column, mark: str) -> list[str]:
    """The cells of a column: means and half intervals over seeds."""
    best = _best(values, column.better)
    return [
        "" if not of_seeds else mark.format(_cell(of_seeds)) if i == best else _cell(of_seeds)
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
