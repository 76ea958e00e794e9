"""Which latent groups a process fits, and how the parts of several become one prior.

Classifiers of different groups are independent (Eq. 4): processes and machines that see the same
run directory each fit a share and never talk to each other. A part is a prior of its own in
RUN/ncp-parts; whoever writes one puts all parts there are together in RUN/ncp.
"""

import os
import shutil
from collections.abc import Iterable, Sequence

from ncprior.groups import parse_groups, spell_groups
from ncprior.priors import NoiseContrastivePrior
from ncprior.runs import Run


def process_place() -> tuple[int, int]:
    """This process's number and how many there are, as torchrun or Slurm say; (0, 1) alone."""
    for number, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if number in os.environ and count in os.environ:
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


def share_of(groups: Sequence[int], number: int, count: int) -> list[int]:
    """The share of process `number` of `count`: neighbours, which are often of one shape."""
    if count > len(groups):
        raise ValueError(
            f"{count} processes for {len(groups)} latent groups: start at most {len(groups)}"
        )
    first, last = (len(groups) * i // count for i in (number, number + 1))
    return list(groups[first:last])


class Parts:
    """The parts of a prior in a run directory."""

    def __init__(self, run: Run) -> None:
        self.run, self.path = run, run.path / "ncp-parts"

    def names(self) -> list[str]:
        """Of the parts that are finished, such as "0-2,5"."""
        return sorted(file.parent.name for file in self.path.glob("*/config.json"))

    def has(self, groups: Sequence[int]) -> bool:
        return spell_groups(groups) in self.names()

    def overlapping(self, groups: Sequence[int]) -> list[str]:
        """Parts with one of `groups` in them."""
        return [name for name in self.names() if set(parse_groups(name)) & set(groups)]

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def add(self, prior: NoiseContrastivePrior) -> NoiseContrastivePrior:
        """Save a part; return all parts there are, as one prior, which is saved as the run's."""
        prior.save_pretrained(self.path / spell_groups(prior.fitted_groups))
        while True:
            names = self.names()
            joined = NoiseContrastivePrior.join(
                [NoiseContrastivePrior.from_pretrained(self.path / name) for name in names]
            )
            joined.heldout_rows = prior.heldout_rows
            self.run.save_prior(joined)
            if self.names() == names:  # else another process finished meanwhile
                return joined
