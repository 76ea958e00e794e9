"""Text fits the terminal; without one it is what it is."""

import sys

import pytest
from rich.table import Table

from ncprior.terminal import TABLE, as_text, has_styles, warned, width, wrapped


@pytest.fixture
def narrow(monkeypatch):
    """A terminal of 40 characters."""
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def table(columns, *, styled=False):
    found = Table("a prior of several words", *[f"figure {k}" for k in range(columns)])
    for column in found.columns[1:]:
        column.justify, column.no_wrap = "right", True
    found.add_row("mixture", *["[bold]0.00104 ± 0.00046[/bold]"] * columns)
    return found


def test_a_file_knows_no_terminal(monkeypatch):
    wide = as_text(table(6))
    monkeypatch.setenv("COLUMNS", "40")
    assert as_text(table(6)) == wide and len(wide.splitlines()[0]) > 100
    assert width(TABLE) == TABLE and not has_styles()


@pytest.mark.parametrize("columns", [1, 2, 6])
def test_no_cell_is_broken(narrow, columns):
    """Columns that do not fit follow below, each once; the name wraps before a number does."""
    text = as_text(table(columns))
    assert max(map(len, text.splitlines())) <= 40
    assert text.count("0.00104 ± 0.00046") == columns and "…" not in text
    assert text.count("mixture") == columns
    for k in range(columns):
        assert text.count(f"figure {k}") == 1


def test_a_number_is_whole_in_the_narrowest_terminal():
    text = as_text(table(2), 12)
    assert text.count("0.00104 ± 0.00046") == 2


def test_bold_only_where_asked_for():
    assert "\x1b[1m0.00104" in as_text(table(1), styled=True)
    assert "\x1b" not in as_text(table(1)) and "[bold]" not in as_text(table(1))


def test_prose(narrow):
    text = (
        "so " * 30
        + "ncprior fit runs/a-name-that-is-much-longer-than-the-terminal-is-wide --overwrite"
    )
    lines = warned(text).splitlines()
    assert lines[0].startswith("! so") and all(line.startswith("  ") for line in lines[1:])
    assert "runs/a-name-that-is-much-longer-than-the-terminal-is-wide" in "".join(lines)
    assert max(len(line) for line in lines if "name" not in line) <= 40
    assert "--overwrite" in wrapped("x" * 35 + " --overwrite").splitlines()


def test_prose_is_never_wider_than_people_read(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "300")
    assert max(map(len, wrapped("so " * 300).splitlines())) <= 100
