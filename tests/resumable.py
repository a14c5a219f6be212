"""Trainings that are killed again and again, and go on: a program for as many kills as one likes.

    python tests/resumable.py 50 0 40       # kills, shared out over the kinds; seed; steps
    python tests/resumable.py 50 0 40 1 2   # the same, and then in two processes that share it

Each attempt runs in processes of its own. They are killed (SIGKILL) after a random time, all or one
of them, or one is inside its n-th save: when the new file is open but not on the disk, or before it
has its name. One that is left without the others ends with an error, soon after.
"""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

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
ALL = -1  # in place of a rank
ALONE = 3  # exit code of a process whose others are gone
SECONDS_ALONE = 2.0  # after which it is killed


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
    with mo.join_ranks(timeout=30):
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


class Death(NamedTuple):
    """How an attempt is to end early.

    Attributes:
        rank: of the process that is killed, or `ALL`.
        seconds: after which it is.
        save: the number of the save in which it is; None for a time.
    """

    rank: int
    seconds: float = 0.0
    save: int | None = None


def attempt(
    kind: str, directory: Path, steps: int, ranks: int = 1, death: Death | None = None
) -> bool:
    """Run in processes of its own; return True if all came to the end, False if one was killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    children = [start(kind, directory, steps, rank, death) for rank in range(ranks)]
    if death is not None and death.save is None:
        time.sleep(death.seconds)
        for rank, child in enumerate(children):
            if death.rank in (rank, ALL):
                os.kill(child, signal.SIGKILL)
    codes = wait(children)
    expected = {0} if death is None else {0, -signal.SIGKILL, *([ALONE] if ranks > 1 else [])}
    assert {*codes} <= expected, codes
    return not any(codes)


def start(kind: str, directory: Path, steps: int, rank: int, death: Death | None) -> int:
    """Return the process of a rank."""
    child = os.fork()
    if child == 0:
        os.environ["RANK"] = str(rank)
        try:
            run(kind, directory, steps, death.save if death and death.rank == rank else None)
        except BaseException as error:
            if death is not None and os.environ["WORLD_SIZE"] != "1":
                os._exit(ALONE)
            print(f"{kind}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return child


def wait(children: list[int]) -> list[int]:
    """Return the exit codes; when one has ended early the others have seconds to do so."""
    codes: dict[int, int] = {}
    end = math.inf
    while len(codes) < len(children):
        time.sleep(0.002)
        for child in {*children} - codes.keys():
            if time.monotonic() > end:  # one that waits for a rank that never came
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
                end = time.monotonic() + SECONDS_ALONE if codes[child] else end
    return [codes[child] for child in children]


def find_newest(directory: Path, ranks: int) -> tuple[int, list[Checkpoints]]:
    """Return (the newest step of which all ranks have a checkpoint, or -1; those of each)."""
    each = [Checkpoints(directory / (f"rank{rank}" if rank else "")) for rank in range(ranks)]
    return max(set.intersection(*[{*one.steps()} for one in each]), default=-1), each


def digest(directory: Path, ranks: int) -> tuple[int, list[str]]:
    """Return the newest step that all ranks have, and for each a digest of all that is in it."""
    step, each = find_newest(directory, ranks)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # one that cannot be read
        found = [one._read(step, None) for one in each]
    assert all(one.best is not None for one in found)
    return step, [digest_of(tree.leaves((one.state, one.best))) for one in found]


def kill(kind: str, kills: int, steps: int, ranks: int, draw: random.Random) -> int:
    """Kill a training again and again; return the number of times it came to its end."""
    ends = 0
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder, "straight")
        began = time.perf_counter()
        assert attempt(kind, straight, steps, ranks)
        duration, expected = time.perf_counter() - began, digest(straight, ranks)
        while kills > 0:
            directory = Path(folder, f"killed {ends}")
            before = -1
            while True:
                rank = draw.randrange(ranks)
                death = Death(draw.choice([rank, ALL]), draw.uniform(0.02, 0.6 * duration))
                saves = 2 * steps // EVERY  # each waits for the disk twice
                if before < 0 and not ends:  # so late that there is something to go on from
                    death = Death(rank, save=draw.randrange(3, saves))
                elif draw.random() < 0.4:
                    death = Death(rank, save=draw.randrange(saves))
                done = attempt(kind, directory, steps, ranks, death if kills > 0 else None)
                kills -= not done
                step, _ = find_newest(directory, ranks)
                assert step >= before, "a checkpoint was lost"
                before = step
                if step >= 0:
                    digest(directory, ranks)  # it can be read
                if done:
                    break
            assert digest(directory, ranks) == expected, f"{kind}: not bit for bit"
            ends += 1
    return ends


def main(kills: int, seed: int, steps: int, *sizes: int) -> None:
    torch.set_num_threads(1)
    draw = random.Random(seed)
    for ranks in sizes or (1,):
        if ranks > 1:
            import_module("torch._dynamo")  # each process would, at its first message
        for place, kind in enumerate(KINDS):
            share = (kills + place) // len(KINDS)
            KINDS[kind]().step()  # what it imports, each process would import again
            ends = kill(kind, share, steps, ranks, draw)
            what = f"{kind} in {ranks} process{'es' * (ranks > 1)}"
            print(f"{what}: {share} kills, {ends} times to the end, each bit for bit", flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
