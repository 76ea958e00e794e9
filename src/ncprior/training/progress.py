"""A progress bar on standard error with the running figures and the time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    def __call__(self, completed: int, figures: dict[str, float] | None = None) -> None: ...


@contextmanager
def progress_bar(description: str, total: int, *, shown: bool = True) -> Iterator[Bar]:
    """Yield a function of the number of steps done and the figures to show beside the bar."""
    if not shown:
        yield lambda completed, figures=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
        TimeRemainingColumn(
            elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)
        ),
        TextColumn("[dim]{task.fields[figures]}", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
    with bar:
        task = bar.add_task(description, total=total, figures="")

        def show(completed: int, figures: dict[str, float] | None = None) -> None:
            fields: dict[str, Any] = {}
            if figures is not None:
                fields["figures"] = "  ".join(
                    f"{name} {value:.4g}" for name, value in figures.items()
                )
            bar.update(task, completed=completed, **fields)

        yield show
