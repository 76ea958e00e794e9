"""What `ncprior compare` found, for the report."""

import base64
from pathlib import Path
from typing import Any

from ncprior.scoreboard import load_comparison


def section(directory: Path) -> dict[str, Any] | None:
    """Table and picture of a comparison in `directory`; None where there is none."""
    if not (directory / "comparison.json").exists():
        return None
    found = load_comparison(directory)
    header, *rows = found.table()
    picture, file = None, directory / "comparison.png"
    if file.exists():
        picture = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return {"header": header, "rows": rows, "note": found.legend(), "picture": picture}
