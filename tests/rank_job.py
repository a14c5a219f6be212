"""A job of several processes in which one is killed: `test_distributed` starts it by torchrun.

torchrun --nproc-per-node 2 --max-restarts 1 tests/rank_job.py FOLDER trains a rate, each rank saves
its state after each step, and rank 1 kills itself in the middle of the third step of the first
attempt.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from waves import Waves, make_training

import metaopt as mo

STEPS = 5


class Killed(Waves):
    """Tasks at whose loss a rank may die."""

    dies = False

    def loss(self, params: Any, batch: Any) -> torch.Tensor:
        if self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(params, batch)


def main(folder: Path, ranks: mo.Ranks) -> None:
    torch.set_num_threads(1)
    tasks: Any = Killed()
    training = make_training(tasks)
    done, saved = 0, sorted(folder.glob(f"rank{ranks.rank}-step*.pt"))
    if saved:
        done = int(saved[-1].stem[-1])
        training.load_state_dict(torch.load(saved[-1], weights_only=False))
    for step in range(done + 1, STEPS + 1):
        is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        tasks.dies = is_first and ranks.rank == 1 and step == 3
        training.step()
        torch.save(training.state_dict(), folder / f"rank{ranks.rank}-step{step}.pt")
    (folder / f"rank{ranks.rank}.txt").write_text(f"{done} {training.optimizer.lr.tolist()!r}")


if __name__ == "__main__":
    with mo.join_ranks(timeout=60) as ranks:
        main(Path(sys.argv[1]), ranks)
