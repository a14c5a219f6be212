"""A job of several processes in which one is killed: `test_distributed` starts it by torchrun.

torchrun --nproc-per-node 2 --max-restarts 1 tests/rank_job.py FOLDER trains a rate, with a
checkpoint after each step, and counts the steps in a tensor that is spread over the ranks. In the
first attempt rank 1 kills itself in the middle of the third step, when rank 0 has one checkpoint
more: that of rank 1 after the second step is taken away.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
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


class Counted:
    """A training that counts its steps, each rank in its part of a tensor."""

    def __init__(self, training: mo.MetaTraining, ranks: mo.Ranks):
        mesh = init_device_mesh("cpu", (ranks.size,))
        self.training, self.counts = training, distribute_tensor(torch.zeros(3), mesh, [Shard(0)])

    def step(self) -> Any:
        self.counts = self.counts + 1
        return self.training.step()

    def state_dict(self) -> dict[str, Any]:
        return {"training": self.training.state_dict(), "counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.training.load_state_dict(state["training"])
        self.counts = state["counts"]


def main(folder: Path, ranks: mo.Ranks) -> None:
    torch.set_num_threads(1)
    tasks: Any = Killed()
    training = Counted(make_training(tasks), ranks)
    checkpoints = mo.Checkpoints(folder)
    is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    trainer = mo.Trainer(
        training, max_steps=STEPS, checkpoint=checkpoints, checkpoint_every=1, resume=True
    )
    began_after = None
    for _ in trainer:
        began_after = trainer.step - 1 if began_after is None else began_after
        tasks.dies = is_first and ranks.rank == 1 and trainer.step == 2
        if tasks.dies:
            checkpoints.path(2).unlink()
    rate, count = training.training.optimizer.lr.tolist(), training.counts.full_tensor().sum()
    (folder / f"rank{ranks.rank}.txt").write_text(f"{began_after} {rate!r} {count.tolist()}")


if __name__ == "__main__":
    with mo.join_ranks(timeout=60) as ranks:
        main(Path(sys.argv[1]), ranks)
