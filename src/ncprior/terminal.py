"""Text for people: as wide as their terminal, of fixed width where a file or a pipe takes it."""

import copy
import io
import shutil
import sys
import textwrap
from typing import Any

PROSE = 100
TABLE = 160


def width(otherwise: int) -> int:
    """The terminal's, in characters; `otherwise` where standard output is none."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else otherwise


def has_styles() -> bool:
    """Whether standard output can show bold text."""
    from rich.console import Console

    console = Console()
    return console.is_terminal and console.color_system is not None


def wrapped(text: str, first: str = "", later: str = "", most: int | None = None) -> str:
    """Prose in lines that fit, at most 100 characters; options and names are not broken."""
    return textwrap.fill(
        text,
        most or min(PROSE, width(PROSE)),
        initial_indent=first,
        subsequent_indent=later,
        break_on_hyphens=False,
        break_long_words=False,
    )


def warned(text: str) -> str:
    """A warning in lines that fit."""
    return wrapped(text, "! ", "  ")


def as_text(renderable: Any, most: int | None = None, *, styled: bool = False) -> str:
    """What rich would print, with codes for bold text if `styled`.

    Columns of a table that there is no room for follow below it, after the first column once more;
    those that may not wrap are never cut, however narrow the terminal.
    """
    from rich.console import Console
    from rich.table import Table

    most, text = most or width(TABLE), io.StringIO()
    for part in _parts(renderable, most) if isinstance(renderable, Table) else [renderable]:
        room = max(most, _least(part))
        Console(file=text, width=room, force_terminal=styled).print(part)
    return text.getvalue().rstrip()


def _parts(table: Any, most: int) -> list[Any]:
    """The table, or several with some of its columns each."""
    first, *others = table.columns
    chosen = [[first]]
    for column in others:
        if len(chosen[-1]) > 1 and _least(_of_columns(table, [*chosen[-1], column])) > most:
            chosen.append([first])
        chosen[-1].append(column)
    return [_of_columns(table, columns) for columns in chosen]


def _of_columns(table: Any, columns: list[Any]) -> Any:
    """Such a table of these columns alone."""
    from rich.text import Text

    found = copy.copy(table)
    found.columns, found.rows = [], []
    for column in columns:
        texts = map(Text.from_markup, (column.header, *column.cells))
        widest = max(len(line) for text in texts for line in text.split())
        found.add_column(
            column.header,
            justify=column.justify,
            no_wrap=column.no_wrap,
            min_width=widest if column.no_wrap else None,
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        found.add_row(*cells)
    return found


def _least(renderable: Any) -> int:
    """The narrowest that it can be printed without cutting a word, or a column that is whole."""
    from rich.console import Console

    return Console(file=io.StringIO(), width=10_000).measure(renderable).minimum
