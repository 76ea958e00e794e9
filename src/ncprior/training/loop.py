"""The one training loop, for the VAE (stage 1) and for the ratios (stage 2)."""

import csv
import io
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from ncprior.numerics import stream_seed
from ncprior.storage import write_bytes
from ncprior.training.checkpoints import load_checkpoint, save_checkpoint
from ncprior.training.interrupt import Interrupt
from ncprior.training.progress import progress_bar


class Job(Protocol):
    """What is trained: one stage."""

    @property
    def module(self) -> nn.Module:
        """What is trained; its forward gives the loss."""
        ...

    def loss(self, model: Any, step: int, generator: Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a step and the figures to report, all of them scalars."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Figures on held-out data."""
        ...

    def should_stop(self) -> bool: ...

    def identity(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimiser and step."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Interrupted(Exception):
    """Ctrl-C was met between two steps; a checkpoint was saved if there is a place for one."""


class Diverged(ValueError):
    """The loss is no longer finite."""


@dataclass
class Place:
    """Where a run in progress lives; without a directory it leaves no trace."""

    directory: Path | None = None
    stage: str = "train"
    resume: bool = False
    tensorboard: bool = True
    checkpoint: Path | None = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = self.directory / f"{self.stage}-checkpoint.pt" if self.directory else None


def optimise(
    job: Job,
    fabric: Any,
    *,
    place: Place,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    warmup: int = 0,
    clip_norm: float | None = None,
    seed: int = 0,
    evaluate_every: int = 250,
    checkpoint_every: int = 1000,
    description: str = "training",
    progress: bool = True,
) -> list[dict[str, float]]:
    """Minimise the job's loss by AdamW with a cosine schedule; return one row per evaluation.

    All randomness of a step follows from `seed` and its number, so that a run which was stopped and
    resumed ends with the same weights, bit for bit on one CPU, as one which was not.

    Raises:
        Diverged: the loss or the weights are not finite; the last good checkpoint is kept.
        Interrupted: Ctrl-C; the work so far is in the checkpoint.
    """
    _check(steps=steps, learning_rate=learning_rate, evaluate_every=evaluate_every)
    optimizer: Any = torch.optim.AdamW(
        job.module.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True
    )
    model, optimizer = fabric.setup(job.module, optimizer)
    identity = {"seed": seed, "steps": steps, "warmup": warmup} | job.identity()
    first, history, totals, counted = _resume(job, optimizer, place, identity)
    write = fabric.is_global_zero and place.directory is not None
    writer = _tensorboard(place, first) if write else None
    generator = Generator(fabric.device)
    synchronous = fabric.device.type == "cpu"
    began, started = first, time.perf_counter()

    def save(step: int) -> None:
        _check_finite(job.module, step, place, learning_rate)
        if write and place.checkpoint:
            content = {
                "identity": identity,
                "step": step,
                "weights": job.module.state_dict(),
                "optimizer": optimizer.state_dict(),
                "job": job.state_dict(),
                "history": history,
                "running": {"totals": totals, "counted": counted},
            }
            save_checkpoint(place.checkpoint, content)

    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        Interrupt() as interrupt,
        progress_bar(description, steps, shown=progress and fabric.is_global_zero) as bar,
    ):
        for step in range(first, steps):
            if interrupt.asked:
                save(step)
                raise Interrupted(_where_saved(step, place))
            step_seed = stream_seed(
                seed, place.stage, step * fabric.world_size + fabric.global_rank
            )
            torch.default_generator.manual_seed(step_seed)  # torch.manual_seed takes far longer
            if devices:
                torch.cuda.manual_seed(step_seed)
            generator.manual_seed(step_seed)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * cosine(step, steps, warmup)

            loss, figures = job.loss(model, step, generator)
            if synchronous and not loss.isfinite():
                _diverged("the loss", step, place, learning_rate)
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss)
            if clip_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=clip_norm)
            optimizer.step()

            done = step + 1
            for name, value in figures.items():
                totals[name] = totals.get(name, 0) + value.detach()
            counted += 1
            if done % evaluate_every == 0 or done == steps:
                row = {name: float(total) / counted for name, total in totals.items()}
                if not all(map(math.isfinite, row.values())):
                    _diverged("the loss", step, place, learning_rate)
                row |= job.evaluate(done)
                history.append({"step": done} | row)
                bar(done, row)
                if write:
                    _log(place, history, writer, (done - began) / (time.perf_counter() - started))
                totals, counted, began, started = {}, 0, done, time.perf_counter()
            elif done % 10 == 0:
                bar(done)
            if job.should_stop():
                break
            if done % checkpoint_every == 0 and done < steps:
                save(done)
        _check_finite(job.module, steps, place, learning_rate)
        if interrupt.asked:
            save(steps)
            raise Interrupted(_where_saved(steps, place))
    if writer is not None:
        writer.close()
    return history


def cosine(step: int, steps: int, warmup: int = 0) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _check(**positive: float) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _resume(
    job: Job, optimizer: Any, place: Place, identity: dict[str, Any]
) -> tuple[int, list[Any], dict[str, Any], int]:
    """Step, history and the sums of figures since the last evaluation."""
    if not (place.resume and place.checkpoint and place.checkpoint.exists()):
        return 0, [], {}, 0
    content = load_checkpoint(place.checkpoint)
    for name, value in identity.items():
        if content["identity"].get(name) != value:
            raise ValueError(
                f"the checkpoint {place.checkpoint} is of another run: its {name} was "
                f"{content['identity'].get(name)}, now it is {value}; use the old settings, or run "
                "without --resume"
            )
    try:
        job.module.load_state_dict(content["weights"])
        optimizer.load_state_dict(content["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the checkpoint {place.checkpoint} is of a run with other settings "
            f"({str(error).splitlines()[0]}); use the old ones, or run without --resume"
        ) from None
    job.load_state_dict(content["job"])
    running = content["running"]
    return content["step"], content["history"], running["totals"], running["counted"]


def _check_finite(module: nn.Module, step: int, place: Place, learning_rate: float) -> None:
    if not all(parameter.isfinite().all() for parameter in module.parameters()):
        _diverged("a weight", step, place, learning_rate)


def _diverged(what: str, step: int, place: Place, learning_rate: float) -> None:
    kept = "no checkpoint was written yet"
    if place.checkpoint and place.checkpoint.exists():
        kept = f"the last good checkpoint is kept in {place.checkpoint}"
    raise Diverged(
        f"{what} became NaN or infinite at step {step}; {kept}. Try a lower learning_rate "
        f"(now {learning_rate:g}) or clip_norm = 1.0, and look for extreme values in the data"
    )


def _where_saved(step: int, place: Place) -> str:
    if place.checkpoint:
        return f"stopped at step {step}; go on with the same command and --resume"
    return f"stopped at step {step}; nothing was kept, since no directory was given"


def _tensorboard(place: Place, step: int) -> Any:
    if not place.tensorboard:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(f"{place.directory}/logs/{place.stage}", purge_step=step)


def _log(place: Place, history: list[dict[str, float]], writer: Any, speed: float) -> None:
    """The whole history as CSV, the newest row to TensorBoard."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(history[-1]), restval="", extrasaction="ignore")
    table.writeheader()
    table.writerows(history)
    assert place.directory is not None
    write_bytes(place.directory / "logs" / f"{place.stage}.csv", text.getvalue().encode())
    if writer is not None:
        for name, value in history[-1].items():
            writer.add_scalar(f"{place.stage}/{name}", value, history[-1]["step"])
        writer.add_scalar(f"{place.stage}/steps_per_second", speed, history[-1]["step"])


def make_fabric(device: str = "auto", precision: str = "32-true", devices: int = 1) -> Any:
    """A launched Lightning Fabric. `device` is "auto", "cpu", "cuda" or "mps"."""
    import warnings

    from lightning_fabric import Fabric

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = Fabric(accelerator=device, devices=devices, precision=precision)  # type: ignore[arg-type]
        fabric.launch()
    return fabric
