"""Devices, precision and several processes, by Lightning Fabric."""

import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
FIRST_LOSS_SCALE = 2.0**10


def make_fabric(
    device: str = "auto", precision: str = "32-true", devices: int = 1, *, alone: bool = False
) -> Any:
    """A launched Lightning Fabric.

    Processes that `torchrun` started work together, whatever `devices` says. Without it, more than
    one device makes Fabric start the running script once more for each of the others.

    Args:
        device: "auto", "cpu", "cuda" (or "gpu") or "mps".
        precision: Fabric's. With "16-mixed" the loss is scaled, by 2^10 at first. On a processor
            without bfloat16 products "bf16-mixed" becomes "32-true", with a warning.
        devices: Devices, and processes, on this machine.
        alone: Work by itself, on a device of its own where there are several, even if `torchrun`
            started other processes too.

    Raises:
        ValueError: a device that this machine lacks.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    check_device(device)
    if devices < 1:
        raise ValueError(f"devices must be at least 1, got {devices}")
    if precision == "bf16-mixed" and _kind(device) == "cpu" and not multiplies_bfloat16():
        warnings.warn(
            "this processor has no bfloat16 products and would take about ten times as long with "
            "precision bf16-mixed: 32-true is used instead",
            stacklevel=2,
        )
        precision = "32-true"
    nodes = 1
    if alone:
        devices = _own_device(device)
    elif "LOCAL_WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    how: dict[str, Any] = {"precision": precision}
    if precision in ("16-mixed", "bf16-mixed"):
        how = {"plugins": _mixed(precision, device)}
    if not alone and devices * nodes > 1:
        how["strategy"] = DDPStrategy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator=device, devices=devices, num_nodes=nodes, **how)
        fabric.launch()
    return fabric


def check_device(device: str) -> None:
    """Raise ValueError for a device that this machine lacks, or that has no such name."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    here = ["auto", "cpu", *["cuda"] * cuda, *["mps"] * mps, *["gpu"] * (cuda or mps)]
    if device not in here:
        but = "" if cuda or mps else ", where torch finds no GPU"
        raise ValueError(f"device must be {' or '.join(here)} on this machine{but}, got {device!r}")


def any_process(fabric: Any, asked: bool) -> bool:
    """Whether it holds in one of the processes; all must call this at the same time."""
    if fabric.world_size == 1:
        return asked
    votes = torch.tensor(float(asked), device=fabric.device)
    return bool(fabric.all_reduce(votes, reduce_op="sum"))


def in_turn(fabric: Any, first: Callable[[], T], others: Callable[[], T]) -> T:
    """What `first` gives in the first process, and once it is done `others` in all others.

    If `first` fails, its error is raised in the first process; the others exit without a word.
    """
    error: Exception | None = None
    if fabric.is_global_zero:
        try:
            result = first()
        except Exception as found:
            error = found
    if any_process(fabric, error is not None):
        raise error or SystemExit(2)
    return result if fabric.is_global_zero else others()


def mean_over_processes(fabric: Any, values: Tensor) -> Tensor:
    """The mean of `values` over processes, without gradient."""
    if fabric.world_size == 1:
        return values.detach()
    return fabric.all_reduce(values.detach().to(fabric.device, copy=True), reduce_op="mean")


def _mixed(precision: str, device: str) -> Any:
    """Fabric's mixed precision, which would also round the images that a model is given."""
    from lightning_fabric.plugins import MixedPrecision

    class Mixed(MixedPrecision):
        def convert_input(self, data: Any) -> Any:
            return data

    kind, scaler = _kind(device), None
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler(kind, init_scale=FIRST_LOSS_SCALE)
    return Mixed(precision, kind, scaler)  # type: ignore[arg-type]


def multiplies_bfloat16() -> bool:
    """False where the processor is known to emulate products of bfloat16 numbers."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _kind(device: str) -> str:
    """The type of device that Fabric's name for an accelerator means on this machine."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        return "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    return {"gpu": "cuda"}.get(device, device)


def _own_device(device: str) -> Any:
    """What Fabric calls one device, or the GPU of this process among those of the machine."""
    if _kind(device) == "cuda" and torch.cuda.device_count() > 1:
        number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
        return [int(number) % torch.cuda.device_count()]
    return 1
