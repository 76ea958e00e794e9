"""Memory that inference takes again and again.

Large blocks that are allocated for every batch come back from the system unmapped, and filling
their pages costs more than the arithmetic; a block kept is also still in the cache.
"""

import threading

import torch
from torch import Tensor

_kept = threading.local()


def scratch(slot: int, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An uninitialised tensor of `shape` in this thread's block `slot`, overwriting its last use.

    Slots are per device and dtype of `like`.
    """
    blocks: dict[object, Tensor] = _kept.__dict__.setdefault("blocks", {})
    key, size = (slot, like.device, like.dtype), torch.Size(shape).numel()
    if key not in blocks or blocks[key].numel() < size:
        blocks[key] = torch.empty(size, device=like.device, dtype=like.dtype)
    return blocks[key][:size].view(shape)
