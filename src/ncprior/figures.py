"""Measured figures: each with its error, unit, number of samples and seed."""

import math
from typing import Any, NamedTuple


class Figure(NamedTuple):
    """One measured number."""

    value: float
    unit: str
    samples: int
    seed: int
    se: float | None = None  # standard error
    interval: tuple[float, float] | None = None  # 95 %
    note: str = ""

    def error(self) -> str:
        """The error as people write it, such as "± 0.02" or "[0.1, 0.3]"."""
        if self.interval is not None:
            return f"[{self.interval[0]:.3f}, {self.interval[1]:.3f}]"
        if self.se is not None and not math.isnan(self.se):
            return f"± {self.se:.2g}"
        return ""

    def text(self) -> str:
        """The value with as many digits as its error supports, three at least."""
        if self.unit == "p-value" and self.value < 0.001:
            return "< 0.001"
        digits = 3
        if self.se is not None and self.se > 0 and math.isfinite(self.se):
            digits = min(6, max(1, 1 - math.floor(math.log10(self.se))))
        return f"{self.value:.{digits}f}"


Figures = dict[str, Figure]

VAE_PRIOR = "vae_prior"
"""Ends the names of figures of the VAE's own prior, where an NCP stands on another base."""


def as_json(figures: Figures) -> dict[str, Any]:
    """Plain values for metrics.json."""
    return {name: figure._asdict() for name, figure in figures.items()}


def from_json(content: dict[str, Any]) -> Figures:
    """What `as_json` wrote."""
    return {
        name: Figure(**(f | {"interval": tuple(f["interval"]) if f.get("interval") else None}))
        for name, f in content.items()
    }


def table(figures: Figures, title: str = "") -> Any:
    """A rich table of figures."""
    from rich.table import Table

    found = Table(title=title or None, title_justify="left", title_style="bold")
    found.add_column("figure", no_wrap=True)  # units alone wrap, and no word is cut
    found.add_column("value", justify="right", no_wrap=True)
    found.add_column("95 % or ± se", no_wrap=True)
    found.add_column("unit")
    found.add_column("samples", justify="right", no_wrap=True)
    for name, figure in figures.items():
        label = name.replace("_", " ")
        found.add_row(label, figure.text(), figure.error(), figure.unit, f"{figure.samples:,}")
    return found
