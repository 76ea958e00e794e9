"""Files that are never left half written, and modules on disk as config.json + safetensors."""

import base64
import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder, moved to `path` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write all of `content` to `path`, or leave what was there.

    Raises:
        OSError: the disk is full or not writable; the message says that nothing was lost.
    """
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        kept = "the previous file is intact" if path.exists() else "no partial file is left"
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"could not write {path} ({reason}); {kept}. Free some space, then run the same "
            "command again with --resume",
        ) from None


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, (json.dumps(content, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; write it anew") from None


def save_tensors(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write config.json and model.safetensors into `directory`."""
    from safetensors.torch import save

    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(directory / "model.safetensors", save(content))
    write_json(directory / "config.json", config)


def load_tensors(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `save_tensors` wrote. Nothing in the files is executed.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    config = read_json(directory / "config.json")
    path = directory / "model.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        return config, load(path.read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); make it anew") from None


def restore(module: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Load `tensors` into `module`, with an error that names what does not fit."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"the weights in {path} do not fit its config.json: {error}") from None


def pack_rows(rows: Tensor) -> str:
    """Row numbers (n,) as text, an eighth of a byte for each row up to the largest, or less."""
    mask = torch.zeros(int(rows.max()) + 1 if len(rows) else 0, dtype=torch.bool)
    mask[rows.cpu()] = True
    return base64.b64encode(zlib.compress(np.packbits(mask.numpy()).tobytes(), 9)).decode()


def unpack_rows(packed: str) -> Tensor:
    """The row numbers that `pack_rows` was given, in rising order."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(packed)), dtype=np.uint8)
    return torch.from_numpy(np.unpackbits(bits)).nonzero().flatten()


def fingerprint(module: nn.Module, without: str | None = None) -> str:
    """SHA-256 of a module's weights and buffers, but for a submodule's, whatever their device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if without is not None and name.startswith(f"{without}."):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
