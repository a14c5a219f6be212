"""Trainings that are killed again and again, and go on: a program for as many kills as one likes.

    python tests/resumable.py 50 0 40   # kills, shared out over the kinds of training; seed; steps

Each attempt runs in a process of its own. It is killed (SIGKILL) after a random time, or inside its
n-th save: when the new file is open but not on the disk, or before it has its name.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metaopt as mo
from metaopt import tree
from metaopt.scan.tensor_file import digest_of
from metaopt.train import Checkpoints, state_file
from optimizers import SGD, Adam, LSTMSchedule, MLPOptimizer

EVERY = 3


def make_levels() -> Any:
    """Return three levels with momentum, Adam, dropout, and two kinds of shuffled data."""
    torch.manual_seed(0)
    x = torch.randn(22, 4)
    data = TensorDataset(x, x.sum(1).relu())
    learner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.ReLU(), nn.Linear(8, 1))
    weigh = nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.2), nn.Sigmoid(), nn.Linear(3, 1))

    def learner_loss(levels: mo.Levels, batch: Any) -> torch.Tensor:
        losses = (levels.learner(batch[0]).squeeze(1) - batch[1]) ** 2
        return (levels.weights(losses.detach()[:, None]).sigmoid().squeeze(1) * losses).mean()

    def weights_loss(levels: mo.Levels, batch: Any) -> torch.Tensor:
        loss = F.mse_loss(levels.learner(batch[0]).squeeze(1), batch[1])
        decay = sum((p**2).sum() for p in levels.weights.params.values())
        return loss + levels.decay.params["weight"].exp().sum() * decay

    def decay_loss(levels: mo.Levels, batch: Any) -> torch.Tensor:
        return (
            F.mse_loss(levels.learner(batch[0]).squeeze(1), batch[1])
            + 0 * levels.decay.params["weight"].sum()
        )

    low = mo.Level(
        "learner",
        learner,
        learner_loss,
        SGD(0.02, momentum=0.9),
        DataLoader(data, batch_size=5, shuffle=True, drop_last=True),
    )
    middle = mo.Level(
        "weights",
        weigh,
        weights_loss,
        Adam(0.01),
        DataLoader(
            data, 6, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(5)
        ),
    )
    top = mo.Level(
        "decay",
        nn.Linear(1, 1, bias=False),
        decay_loss,
        Adam(0.01),
        mo.Shuffled(data.tensors, 7, seed=3),
    )
    return mo.LevelGraph([mo.Edge(middle, low, steps=2), mo.Edge(top, middle, steps=2)])


def make_meta_training(estimator: Any, optimizer: Callable[[], Any]) -> Any:
    return mo.MetaTraining(
        optimizer(),
        mo.tasks.Quadratics(dimension=3),
        estimator=estimator,
        outer=Adam(0.01),
        horizon=10,
    )


KINDS: dict[str, Callable[[], Any]] = {
    "levels": make_levels,
    "PES": lambda: make_meta_training(mo.PES(0.01, 4, window=4), lambda: MLPOptimizer(4)),
    "NRES": lambda: make_meta_training(mo.NRES(0.01, 4, window=4), lambda: MLPOptimizer(4)),
    "schedule": lambda: make_meta_training(
        mo.TruncatedBackprop(4, 3, mo.Backprop()), lambda: SGD(lr=LSTMSchedule(0.05, 10))
    ),
}


def run(kind: str, directory: Path, steps: int, die_in_save: int | None) -> None:
    """Train to the end, or until it is killed inside a save."""
    if die_in_save is not None:
        count = iter(range(die_in_save))

        def sync(file: int) -> None:
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        state_file.tensor_file.os.fsync = sync  # type: ignore[attr-defined]
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - their states are in a checkpoint too
    training = KINDS[kind]()
    trainer = mo.Trainer(
        training,
        max_steps=steps,
        validate=lambda: abs(trainer.step - 7) + torch.rand(()).item(),  # best on the way
        validate_every=7,
        checkpoint=directory,
        checkpoint_every=EVERY,
        resume=True,
        progress=False,
    )
    trainer.fit()


def attempt(
    kind: str, directory: Path, steps: int, seconds: float | None = None, save: Any = None
) -> bool:
    """Run in a process of its own; return True if it came to its end, False if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run(kind, directory, steps, save)
        except BaseException as error:
            print(f"{kind}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def digest(directory: Path) -> tuple[int, str]:
    """Return the step of the newest checkpoint, and the digest of all that is in it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that cannot be read
        found = Checkpoints(directory).load()
    assert found is not None
    assert found.best is not None
    return found.step, digest_of(tree.leaves((found.state, found.best)))


def kill(kind: str, kills: int, steps: int, draw: random.Random) -> int:
    """Kill a training again and again; return the number of times it came to its end."""
    ends = 0
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder, "straight")
        began = time.perf_counter()
        assert attempt(kind, straight, steps)
        duration, expected = time.perf_counter() - began, digest(straight)
        while kills > 0:
            directory = Path(folder, f"killed {ends}")
            before = -1
            while True:
                how: dict[str, Any] = {"seconds": draw.uniform(0.02, 0.6 * duration)}
                if draw.random() < 0.4:
                    how = {"save": draw.randrange(steps // EVERY)}
                done = attempt(kind, directory, steps, **(how if kills > 0 else {}))
                kills -= not done
                if [*directory.glob("step-*.safetensors")]:
                    step, _ = digest(directory)
                    assert step >= before, "a checkpoint was lost"
                    before = step
                if done:
                    break
            assert digest(directory) == expected, f"{kind}: not bit for bit"
            ends += 1
    return ends


def main(kills: int, seed: int, steps: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    for place, kind in enumerate(KINDS):
        share = (kills + place) // len(KINDS)
        KINDS[kind]().step()  # what it imports, each process would import again
        ends = kill(kind, share, steps, draw)
        print(f"{kind}: {share} kills, {ends} times to the end, each bit for bit", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
