"""What a second process gains, by the clock: the options --speed-up and --overlap of `scaling.py`.

A machine that does something else beside does not tell: two processes need two free cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from contenders.problems import Omniglot
from tabulate import tabulate
from torch import Tensor, nn

import metaopt as mo
from metaopt.autodiff import gradient as gradients
from metaopt.distributed import (
    copy_beside_backward,
    copy_to_ranks,
    sum_over_ranks,
    work_alone,
)
from optimizers import SGD, Adam, MLPOptimizer

MB = 2**20


def clock(steps: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Return the median seconds of each step, in turns; all ranks begin one together."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(turns):
        for name, step in steps.items():
            dist.barrier()
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    return {name: median(each[1:]) for name, each in times.items()}  # the first one warms up


# Tasks and pairs that are shared out.


def make_maml() -> Callable[[], Any]:
    """Return a step: the meta-gradient of 8 tasks of a conv-4, 5 inner steps, second order."""
    problem = Omniglot()
    model, tasks = problem.channels_last()
    net = mo.functional(model)

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(params, batch[0]), batch[1])

    def task_loss(params: Any, task: Any) -> Tensor:
        inner = SGD(problem.lr)
        return loss(
            mo.minimize(loss, inner, params, task.support, steps=problem.steps).params, task.query
        )

    meta_gradient = mo.meta_grad(task_loss, chunk_size=1)
    return lambda: meta_gradient(net.params, tasks)


def make_pes(pairs: int) -> Callable[[], Any]:
    """Return a step: an estimate by pairs of a learned optimizer that trains on digits."""
    torch.manual_seed(0)
    estimator = mo.PES(0.01, pairs=pairs, window=5, chunk_size=16)
    return mo.MetaTraining(
        MLPOptimizer(hidden_size=16),
        mo.tasks.DigitsMLP(),
        estimator=estimator,
        outer=Adam(1e-3),
        horizon=50,
    ).step


def measure_speed_up(ranks: mo.Ranks, turns: int = 9) -> str:
    """Return the table of one process, whose other rank waits, and of two."""
    rows = []
    for name, make in (
        ("MAML, conv-4, 8 tasks", make_maml),
        ("PES, 32 pairs, digits", partial(make_pes, 32)),
        ("PES, 128 pairs, digits", partial(make_pes, 128)),
    ):
        with work_alone():
            one = make()

        def alone(one: Callable[[], Any] = one) -> None:
            if ranks.rank == 0:
                with work_alone():
                    one()

        found = clock({"alone": alone, "shared": make()}, turns)
        rows.append([name, *found.values(), found["alone"] / found["shared"]])
    headers = ["a step of", "one process, s", "two processes, s", "ratio"]
    return tabulate(rows, headers, tablefmt="github", floatfmt=("", ".3f", ".3f", ".2f"))


# Sums that are sent beside the backward pass.


class Encoder(nn.Module):
    """A transformer of 22 million parameters, more than half of them the embedding."""

    def __init__(self, vocabulary: int = 30_522, width: int = 384, layers: int = 6):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, 12, 4 * width, dropout=0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits [examples, 2]."""
        logits: Tensor = self.head(self.body(self.embed(tokens)).mean(1))
        return logits


@dataclass
class Timeline:
    """Of one gradient: when its backward pass was, and each sum that was sent beside it.

    Attributes:
        backward: (begin, end), seconds.
        sums: (begin, end, bytes) of each.
    """

    backward: tuple[float, float] = (0.0, 0.0)
    sums: list[tuple[float, float, int]] = field(default_factory=list)

    def hidden(self) -> float:
        """Return the part of the time with a sum on its way in which the pass was running."""
        total = inside = last = 0.0
        for begin, end, _ in sorted(self.sums):
            begin, last = max(begin, last), max(end, last)
            total += max(last - begin, 0)
            inside += max(min(last, self.backward[1]) - begin, 0)
        return inside / total

    def show(self) -> str:
        """Return the table."""
        start = self.backward[0]
        rows = [[size / MB, begin - start, end - start] for begin, end, size in sorted(self.sums)]
        headers = ["bucket, MiB", "starts, s", "is there, s"]
        return tabulate(rows, headers, tablefmt="github", floatfmt=("6.1f", ".3f", ".3f"))


@contextmanager
def watched(line: Timeline) -> Iterator[None]:
    """While entered, note when a backward pass is and what is sent beside it."""
    send: Callable[..., Any] = dist.all_reduce
    differentiate = gradients.slopes_of_scalar

    def note(message: Tensor, async_op: bool = False) -> Any:
        if not async_op:
            return send(message)
        begin, work = time.perf_counter(), send(message, async_op=True)
        # by gloo's own thread
        work.get_future().then(
            lambda _: line.sums.append((begin, time.perf_counter(), message.nbytes))
        )
        return work

    def time_backward(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        found = differentiate(*args, **kwargs)
        line.backward = (begin, time.perf_counter())
        return found

    with (
        patch.object(dist, "all_reduce", note),
        patch.object(gradients, "slopes_of_scalar", time_backward),
    ):
        yield


def sums_afterwards(step: Callable[[], Any]) -> Callable[[], Any]:
    """Return a step whose gradients are each sent as one message after their backward pass."""

    def run() -> Any:
        with patch.object(gradients, "is_shared", lambda: False):
            return step()

    return run


def measure_overlap(ranks: mo.Ranks, turns: int = 6) -> str:
    """Return tables: one gradient, a step of levels by SAMA, and the buckets of a gradient."""
    torch.manual_seed(0)
    model = Encoder()
    batch = (torch.randint(30_522, (8, 32)), torch.randint(2, (8,)))
    tokens, labels = ranks.own(batch)
    net = mo.functional(model)
    params = {name: one.detach() for name, one in net.params.items()}
    ddp = nn.parallel.DistributedDataParallel(model)

    def loss(params: Any) -> tuple[Tensor, Any]:
        seen = copy_beside_backward(params) or copy_to_ranks(params, ranks)
        own = F.cross_entropy(net(seen, tokens), labels) / ranks.size
        return sum_over_ranks(own, ranks), ()

    def gradient() -> Any:
        with torch.no_grad():
            return gradients.gradient(loss, params)[0]

    def gradient_by_torch() -> None:
        ddp.zero_grad()
        F.cross_entropy(ddp(tokens), labels).backward()

    def learner_loss(levels: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(levels.learner(batch[0]), batch[1], reduction="none")
        return (levels.weights(losses.detach()[:, None]).sigmoid()[:, 0] * losses).mean()

    def meta_loss(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.learner(batch[0]), batch[1])

    learner = mo.Level("learner", model, learner_loss, SGD(0.01), [batch])
    top = mo.Level("weights", nn.Linear(1, 1), meta_loss, Adam(1e-3), [batch])
    graph = mo.LevelGraph([mo.Edge(top, learner, steps=1, differentiate=mo.SAMA())])

    afterwards = sums_afterwards(gradient)
    # of two numbers, the sum has the same bits in any order
    assert all(map(torch.equal, gradient().values(), afterwards().values()))
    one = clock({"beside": gradient, "after": afterwards, "torch's": gradient_by_torch}, turns)
    step = clock({"beside": graph.step, "after": sums_afterwards(graph.step)}, turns)
    lines = [Timeline() for _ in range(turns)]
    for line in lines:
        dist.barrier()
        with watched(line):
            gradient()
        dist.barrier()  # and gloo's thread has noted the last one
    rows = [
        ["one gradient", one["beside"], one["after"], one["torch's"]],
        ["SAMA, 1 inner step", step["beside"], step["after"], None],
    ]
    headers = ["seconds of", "beside the pass", "after it", "DistributedDataParallel"]
    last = lines[-1]
    hidden = median(line.hidden() for line in lines)
    return (
        tabulate(rows, headers, tablefmt="github", floatfmt=".3f")
        + f"\n\nhidden: {hidden:.0%} of the time with a sum on its way; the last pass took "
        f"{last.backward[1] - last.backward[0]:.3f} s\n\n{last.show()}"
    )
