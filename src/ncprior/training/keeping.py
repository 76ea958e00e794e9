"""The last good state of a run in progress: on disk where it has a place, in memory before."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ncprior.training.checkpoints import load_checkpoint, save_checkpoint
from ncprior.training.processes import mean_over_processes


class Diverged(ValueError):
    """The loss or a weight is no longer finite."""


@dataclass
class Place:
    """Where a run in progress lives; without a directory it leaves no trace."""

    directory: Path | None = None
    stage: str = "train"
    resume: bool = False
    tensorboard: bool = True
    part: str = ""  # tells the files of a part of the groups from those of others
    checkpoint: Path | None = field(init=False)

    def __post_init__(self) -> None:
        self.name = self.stage + self.part
        self.checkpoint = self.directory / f"{self.name}-checkpoint.pt" if self.directory else None


@dataclass
class Standing:
    """How far a run is, beside its weights and its optimiser."""

    step: int = 0  # steps done
    history: list[dict[str, float]] = field(default_factory=list)
    totals: dict[str, Any] = field(default_factory=dict)  # of figures, since the last evaluation
    counted: int = 0  # steps in `totals`
    halvings: int = 0  # of the learning rate, one for each divergence


class Keeper:
    """Keeps a run whenever it is good, and brings it back.

    Args:
        job: What is trained.
        optimizer: Its optimiser, as Fabric set it up.
        fabric: The first of its processes writes; all of them read.
        place: Where.
        identity: What must be the same for a resumed run to be the same run.
        learning_rate: The rate asked for. A resumed run that asks for another one starts with that,
            not halved.
    """

    def __init__(
        self,
        job: Any,
        optimizer: Any,
        fabric: Any,
        place: Place,
        identity: dict[str, Any],
        learning_rate: float,
    ) -> None:
        self.job, self.optimizer, self.fabric, self.place = job, optimizer, fabric, place
        self.identity, self.learning_rate = identity, learning_rate
        self.precision = fabric.strategy.precision
        self.in_memory: dict[str, Any] | None = None
        self.on_disk = False

    def begin(self) -> Standing:
        """The standing at which to begin: that of the checkpoint where asked for, else none."""
        path = self.place.checkpoint
        if self.place.resume and path and path.exists():
            content = load_checkpoint(path)
            self._check_same(content["identity"])
            self.on_disk = True
            return self._restore(content)
        standing = Standing()
        self.in_memory = copy.deepcopy(self._content(standing))
        return standing

    def keep(self, standing: Standing) -> None:
        """Keep this standing, if all weights are finite.

        Raises:
            Diverged: they are not; what was kept before stays.
        """
        check_finite(self.job.module)
        for name, total in standing.totals.items():
            standing.totals[name] = mean_over_processes(self.fabric, torch.as_tensor(total))
        content = self._content(standing)
        if self.place.checkpoint:
            if self.fabric.is_global_zero:
                save_checkpoint(self.place.checkpoint, content)
            self.fabric.barrier()  # others may read it only once it is whole
            self.on_disk, self.in_memory = True, None
        else:
            self.in_memory = copy.deepcopy(content)

    def go_back(self, halvings: int) -> Standing:
        """The last good standing, from which to go on with so many halvings of the rate."""
        if self.on_disk:
            assert self.place.checkpoint is not None
            standing = self._restore(load_checkpoint(self.place.checkpoint))
        else:
            standing = self._restore(copy.deepcopy(self.in_memory))
        standing.halvings = halvings
        if standing.step:
            self.keep(standing)  # a run that is killed now need not diverge again to learn it
        return standing

    def where(self) -> str:
        """Where what is good lies, for whoever the run stopped on."""
        if self.on_disk:
            return f"the last good checkpoint is kept in {self.place.checkpoint}"
        return "no checkpoint was written yet"

    def _content(self, standing: Standing) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "step": standing.step,
            "weights": self.job.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "job": self.job.state_dict(),
            "history": standing.history,
            "running": {"totals": standing.totals, "counted": standing.counted},
            "learning_rate": self.learning_rate,
            "halvings": standing.halvings,
        }

    def _restore(self, content: Any) -> Standing:
        try:
            self.job.module.load_state_dict(content["weights"])
            self.optimizer.load_state_dict(content["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint {self.place.checkpoint} is of a run with other settings "
                f"({str(error).splitlines()[0]}); use the old ones, or run without --resume"
            ) from None
        if content.get("precision"):
            self.precision.load_state_dict(content["precision"])
        self.job.load_state_dict(content["job"])
        same_rate = content.get("learning_rate") == self.learning_rate
        return Standing(
            step=content["step"],
            history=content["history"],
            totals=content["running"]["totals"],
            counted=content["running"]["counted"],
            halvings=content.get("halvings", 0) if same_rate else 0,
        )

    def _check_same(self, found: dict[str, Any]) -> None:
        for name, value in self.identity.items():
            if found.get(name) != value:
                raise ValueError(
                    f"the checkpoint {self.place.checkpoint} is of another run: its {name} was "
                    f"{found.get(name)}, now it is {value}; use the old settings, or run "
                    "without --resume"
                )


def check_finite(module: nn.Module) -> None:
    """Raise `Diverged` unless all parameters and running statistics are finite."""
    found = list(module.parameters())
    for part in module.modules():
        statistics = (getattr(part, name, None) for name in ("running_mean", "running_var"))
        found += [tensor for tensor in statistics if tensor is not None]
    if found and not torch.stack([tensor.isfinite().all() for tensor in found]).all():
        raise Diverged("a weight became NaN or infinite")
