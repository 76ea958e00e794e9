"""Fit one process's share of a run's groups; with a step, kill the process there.

python share_job.py RUN RANK WORLD_SIZE [STEP]
"""

import os
import signal
import sys
from pathlib import Path

from toys import interrupt_at

from ncprior.pipeline import fit_run
from ncprior.runs import Run

run, rank, world_size, *step = sys.argv[1:]
os.environ |= {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
if step:
    load_vae = Run.load_vae
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    Run.load_vae = lambda self: interrupt_at(
        load_vae(self), int(step[0]) + 1, kill
    )  # after check_vae's
fit_run(Run.open(Path(run)), resume=True, progress=False)
