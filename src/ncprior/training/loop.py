"""The one training loop, for the VAE (stage 1) and for the ratios (stage 2)."""

import csv
import io
import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Generator, Tensor, nn

from ncprior.numerics import stream_seed
from ncprior.storage import write_bytes
from ncprior.training.interrupt import Interrupt
from ncprior.training.keeping import Diverged, Keeper, Place, Standing, check_finite
from ncprior.training.processes import any_process, make_fabric, mean_over_processes
from ncprior.training.progress import Bar, progress_bar

__all__ = ["Diverged", "Interrupted", "Job", "Place", "cosine", "make_fabric", "optimise"]

LOOK_EVERY = 10  # steps between looks at what a GPU or the other processes found


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


def optimise(
    job: Job,
    fabric: Any,
    *,
    place: Place,
    steps: int,
    learning_rate: float,
    learning_rate_end: float = 0.0,
    optimizer: str = "adamw",
    eps: float = 1e-8,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    warmup: int = 0,
    clip_norm: float | None = None,
    retries: int = 3,
    seed: int = 0,
    evaluate_every: int = 250,
    checkpoint_every: int = 1000,
    begin: Callable[[], None] | None = None,
    description: str = "training",
    progress: bool = True,
) -> list[dict[str, float]]:
    """Minimise the job's loss with a cosine schedule; return one row per evaluation.

    All randomness of a step follows from `seed` and its number, so that a run which was stopped and
    resumed ends with the same weights, bit for bit on one CPU, as one which was not.

    Where the loss or a weight is not finite the run goes back to its last checkpoint, or to its
    start, and goes on from there with half the learning rate, `retries` times at most. From then on
    the rows have a column `recoveries`. Nothing that is not finite is ever saved.

    `begin` is called once all settings are found to work, before anything is written.

    Raises:
        Diverged: the loss or the weights are not finite once more; the last good checkpoint is
            kept.
        Interrupted: Ctrl-C; the work so far is in the checkpoint.
    """
    _check(steps=steps, learning_rate=learning_rate, evaluate_every=evaluate_every, eps=eps)
    if not 0 <= learning_rate_end <= learning_rate:
        raise ValueError(
            f"learning_rate_end must be between 0 and learning_rate ({learning_rate:g}), got "
            f"{learning_rate_end}"
        )
    if retries < 0:
        raise ValueError(f"retries must be at least 0, got {retries}")
    scaled = getattr(fabric.strategy.precision, "scaler", None) is not None
    made = _make_optimizer(
        optimizer,
        job.module,
        lr=learning_rate,
        eps=eps,
        betas=betas,
        weight_decay=weight_decay,
        fused=not (scaled and clip_norm is not None),  # a fused step scales back only by itself
    )
    model, made = fabric.setup(job.module, made)
    identity = {"seed": seed, "steps": steps, "warmup": warmup, "optimizer": optimizer}
    identity |= job.identity()
    keeper = Keeper(job, made, fabric, place, identity, learning_rate)
    end = learning_rate_end / learning_rate
    devices = [fabric.device] if fabric.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        Interrupt() as interrupt,
        progress_bar(description, steps, shown=progress and fabric.is_global_zero) as bar,
    ):
        now = keeper.begin()
        if begin is not None:
            begin()
        log = _Log(place, now.step) if fabric.is_global_zero and place.directory else None
        runner = _Steps(job, model, made, fabric, place.stage, seed, clip_norm)
        finished = now.step >= steps
        while not finished:
            try:
                if runner.looks(now.step) and any_process(fabric, interrupt.asked):
                    runner.check()
                    keeper.keep(now)
                    raise Interrupted(_where_saved(now.step, place))
                rate = learning_rate * cosine(now.step, steps, warmup, end) / 2**now.halvings
                runner.step(now, rate)
                evaluated = now.step % evaluate_every == 0 or now.step == steps
                finished = now.step == steps
                if evaluated:
                    _evaluate(runner, now, bar, log)
                    finished = finished or job.should_stop()
                elif now.step % 10 == 0:
                    bar(now.step)
                if finished:
                    runner.check()
                    check_finite(job.module)
                elif now.step % checkpoint_every == 0:
                    runner.check()
                    keeper.keep(now)
            except Diverged as error:
                found = f"{error} at step {runner.at}"
                if now.halvings >= retries:
                    raise Diverged(_advice(found, keeper, learning_rate, now.halvings)) from None
                now = keeper.go_back(now.halvings + 1)
                runner.forget()
                if log:
                    log.begin(now.step)
                finished = False
                if fabric.is_global_zero:
                    _say(found, now, retries)
        if any_process(fabric, interrupt.asked):
            now.step = steps
            keeper.keep(now)
            raise Interrupted(_where_saved(steps, place))
    if log:
        log.close()
    return now.history


class _Steps:
    """Takes the steps of a run, and knows of numbers that are not finite as soon as it can.

    The CPU is asked at every step. A GPU would have to be waited for, and processes have to agree:
    there the steps collect what they find until somebody looks.
    """

    def __init__(
        self,
        job: Job,
        model: Any,
        optimizer: Any,
        fabric: Any,
        stage: str,
        seed: int,
        clip_norm: float | None,
    ) -> None:
        self.job, self.model, self.optimizer, self.fabric = job, model, optimizer, fabric
        self.stage, self.seed, self.clip_norm = stage, seed, clip_norm
        self.generator = Generator(fabric.device)
        self.at = 0  # the step last taken
        self.patient = fabric.device.type != "cpu"
        self.forget()

    def step(self, now: Standing, rate: float) -> None:
        """One step of the optimiser; `now` moves on."""
        fabric, self.at = self.fabric, now.step
        index = now.step * fabric.world_size + fabric.global_rank
        self.generator.manual_seed(stream_seed(self.seed, self.stage, index))
        # Networks draw (dropout) from the global state. It has a seed of its own: masks made of the
        # numbers that made the draws would tell the one from the other.
        own = stream_seed(self.seed, f"{self.stage} networks", index)
        torch.default_generator.manual_seed(own)  # torch.manual_seed takes far longer
        if fabric.device.type == "cuda":
            torch.cuda.manual_seed(own)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        loss, figures = self.job.loss(self.model, now.step, self.generator)
        self.broken |= ~loss.detach().isfinite()
        if self.looks(now.step):
            self.check()
        self.optimizer.zero_grad(set_to_none=True)
        fabric.backward(loss)
        if self.clip_norm is not None:
            fabric.clip_gradients(
                self.model, self.optimizer, max_norm=self.clip_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        for name, value in figures.items():
            now.totals[name] = now.totals.get(name, 0) + value.detach()
        now.counted += 1
        now.step += 1

    def looks(self, step: int) -> bool:
        """Whether this step is one that waits for the others."""
        return not self.patient or step % LOOK_EVERY == 0

    def check(self) -> None:
        """Raise `Diverged` if a loss was not finite since the last call of `forget`."""
        if any_process(self.fabric, bool(self.broken)):
            raise Diverged("the loss became NaN or infinite")

    def forget(self) -> None:
        self.broken = torch.zeros((), dtype=torch.bool, device=self.fabric.device)


def _evaluate(runner: _Steps, now: Standing, bar: Bar, log: "_Log | None") -> None:
    """Add a row to the history: means since the last one, and figures on held-out data."""
    means = {
        name: float(mean_over_processes(runner.fabric, total)) / now.counted
        for name, total in now.totals.items()
    }
    runner.check()
    if not all(map(math.isfinite, means.values())):
        raise Diverged("the loss became NaN or infinite")
    row = means | runner.job.evaluate(now.step)
    if now.halvings:
        row["recoveries"] = float(now.halvings)
    now.history.append({"step": now.step} | row)
    bar(now.step, row)
    if log:
        log.write(now)
    now.totals, now.counted = {}, 0


def cosine(step: int, steps: int, warmup: int = 0, end: float = 0.0) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    falling = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return end + (1 - end) * falling


def _make_optimizer(name: str, module: nn.Module, *, fused: bool, **options: Any) -> Any:
    parameters = _by_share(module)
    if name == "adamw":
        return torch.optim.AdamW(parameters, fused=fused, **options)
    if name == "adam":
        return torch.optim.Adam(parameters, fused=fused, **options)
    if name == "adamax":
        return torch.optim.Adamax(parameters, foreach=True, **options)
    raise ValueError(f'optimizer must be "adamw", "adam" or "adamax", got {name!r}')


def _by_share(module: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters by their share of the learning rate.

    It is 1, or the `learning_rate_share` of the innermost module around them that has one.
    """
    shares: dict[nn.Parameter, float] = dict.fromkeys(module.parameters(), 1.0)
    for part in module.modules():  # from the outside in
        share: Any = getattr(part, "learning_rate_share", None)
        if share is not None:
            shares |= dict.fromkeys(part.parameters(), share)
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter, own in shares.items():
        groups.setdefault(own, []).append(parameter)
    return [{"params": those, "share": own} for own, those in groups.items()]


def _check(**positive: float) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def _advice(found: str, keeper: Keeper, learning_rate: float, halvings: int) -> str:
    halved = f", halved {halvings} times" if halvings else ""
    return (
        f"{found}; {keeper.where()}. Try a lower learning_rate (now {learning_rate:g}{halved}) or "
        "clip_norm = 1.0, and look for extreme values in the data"
    )


def _say(found: str, now: Standing, retries: int) -> None:
    """One line on standard error, which a progress bar makes room for."""
    print(
        f"{found}: back to step {now.step}, with half the learning rate "
        f"(recovery {now.halvings} of at most {retries})",
        file=sys.stderr,
    )


def _where_saved(step: int, place: Place) -> str:
    if place.checkpoint:
        return f"stopped at step {step}; go on with the same command and --resume"
    return f"stopped at step {step}; nothing was kept, since no directory was given"


class _Log:
    """The history as a CSV file and, row by row, in TensorBoard."""

    def __init__(self, place: Place, step: int) -> None:
        self.place = place
        self.begin(step)
        self.writer: Any = None
        if place.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(f"{place.directory}/logs/{place.name}", purge_step=step)

    def begin(self, step: int) -> None:
        """From here and now on steps are timed."""
        self.step, self.time = step, time.perf_counter()

    def write(self, now: Standing) -> None:
        """The whole history as CSV, the newest row to TensorBoard."""
        history, run_name, text = now.history, self.place.name, io.StringIO()
        table = csv.DictWriter(
            text, fieldnames=list(history[-1]), restval="", extrasaction="ignore"
        )
        table.writeheader()
        table.writerows(history)
        assert self.place.directory is not None
        write_bytes(self.place.directory / "logs" / f"{run_name}.csv", text.getvalue().encode())
        if self.writer is not None:
            for name, value in history[-1].items():
                self.writer.add_scalar(f"{run_name}/{name}", value, now.step)
            speed = (now.step - self.step) / (time.perf_counter() - self.time)
            self.writer.add_scalar(f"{run_name}/steps_per_second", speed, now.step)
        self.begin(now.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
