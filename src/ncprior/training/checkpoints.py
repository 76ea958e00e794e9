"""One checkpoint of a run in progress: tensors and plain values, never code."""

import io
from pathlib import Path
from typing import Any

import torch

from ncprior.storage import write_bytes

FORMAT = 1


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write `content` whole, or leave the previous checkpoint."""
    buffer = io.BytesIO()
    torch.save({"format": FORMAT} | content, buffer)
    write_bytes(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint with `weights_only=True`.

    Raises:
        ValueError: it is cut short, damaged, or of another version.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise ValueError(
            f"the checkpoint {path} is damaged or cut short ({reason}); "
            "delete it and run again without --resume to start anew"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(
            f"the checkpoint {path} is of another version; delete it and run again without --resume"
        )
    return content
