"""What each way of sharing work costs, and how far it scales.

    python scripts/scaling.py                                    # what the model predicts
    torchrun --nproc-per-node 2 scripts/scaling.py --measure     # what it is fitted to
    torchrun --nproc-per-node 2 scripts/scaling.py --speed-up    # two processes against one
    torchrun --nproc-per-node 2 scripts/scaling.py --overlap     # sums beside the backward pass

The tables of docs/pages/guides/many-processes.md come from here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from two_processes import measure_overlap, measure_speed_up

import metaopt as mo
from metaopt.distributed import sum_over_ranks
from metaopt.distributed.overlap import BUCKET, FIRST_BUCKET
from metaopt.extras import extra
from optimizers import SGD, Adam, MLPOptimizer

with extra("scripts/scaling.py"):
    import tyro
    from tabulate import tabulate

RANKS = (8, 64, 1024)
FLOAT = 4  # bytes


@dataclass(frozen=True)
class Network:
    """Between ranks: seconds before a message arrives, and bytes a second in each direction."""

    name: str
    latency: float
    bandwidth: float
    reach: int | None = None
    beyond: Network | None = None
    """what connects groups of `reach` ranks"""

    def all_reduce(self, size: float, ranks: int) -> float:
        """Return the seconds of a sum of `size` bytes: of a ring or of a tree, the faster."""
        if self.reach is not None and self.beyond is not None and ranks > self.reach:
            # within each group, and its parts between the groups
            between = self.beyond.all_reduce(size / self.reach, ranks // self.reach)
            return self.all_reduce(size, self.reach) + between
        moved = size / self.bandwidth
        ring = 2 * (ranks - 1) * self.latency + 2 * (ranks - 1) / ranks * moved
        tree = 2 * math.ceil(math.log2(ranks)) * (self.latency + moved)
        return min(ring, tree)


ETHERNET = Network("Ethernet, 25 Gb/s", 30e-6, 25e9 / 8)
INFINIBAND = Network("InfiniBand, 400 Gb/s", 5e-6, 400e9 / 8)
NVLINK = Network("NVLink, 450 GB/s", 5e-6, 450e9, 8, INFINIBAND)


@dataclass(frozen=True)
class Way:
    """A way of sharing, and an example of it.

    Attributes:
        name: of both.
        shared: seconds of one process that the ranks share.
        own: seconds that every rank spends, however many there are.
        messages: bytes of each message of a step.
        hidden: seconds of work beside which the messages are sent.
        late: bytes of each message, among these, that is not sent before that work is over.
        grows: whether each rank has as much to do, however many there are (the batch grows), or the
            work is shared out.
        parts: number of tasks or pairs, more than which no ranks have anything to do.
    """

    name: str
    shared: float
    own: float
    messages: tuple[float, ...]
    hidden: float = 0.0
    late: tuple[float, ...] = ()
    grows: bool = False
    parts: int | None = None

    def time(self, ranks: int, network: Network) -> float:
        """Return the seconds of a step."""
        sent, late = (
            sum(network.all_reduce(size, ranks) for size in sizes)
            for sizes in (self.messages, self.late)
        )
        work = self.shared if self.grows else self.shared / ranks
        return self.own + work + max(late, sent - self.hidden)

    def efficiency(self, ranks: int, network: Network) -> float:
        """Return the part of the ranks' time that is work, which one process would do too."""
        work = self.shared + self.own if self.grows else (self.shared + self.own) / ranks
        return work / self.time(ranks, network)

    def limit(self, network: Network) -> int:
        """Return the largest power of two of ranks of which half the time is work."""
        most = self.parts or 2**20
        ranks = 1
        while 2 * ranks <= most and self.efficiency(2 * ranks, network) >= 0.5:
            ranks *= 2
        return ranks


def fill_buckets(size: float) -> tuple[float, ...]:
    """Return the messages of a gradient of `size` bytes, sent beside its backward pass."""
    if size <= FIRST_BUCKET:
        return (size,)
    full, rest = divmod(size - FIRST_BUCKET, BUCKET)
    return (FIRST_BUCKET, *(BUCKET,) * int(full), *((rest,) if rest else ()))


def sama(params: float, meta: float, steps: int) -> tuple[float, ...]:
    """Return the messages of `steps` inner steps and a hypergradient by SAMA."""
    # the inner gradients, that of the outer loss, and that of the inner loss where the steps ended:
    # a scalar on the way, a gradient on the way back
    gradients = (FLOAT, *fill_buckets(FLOAT * params)) * (steps + 2)
    # and at the two displaced points
    return gradients + (FLOAT, *fill_buckets(FLOAT * meta)) * 2


def backprop(params: float, meta: float, steps: int) -> tuple[float, ...]:
    """Return the messages of `steps` inner steps and the derivative through all of them."""
    forward = (FLOAT, FLOAT * params) * (steps + 1)
    # nobody asks for the derivative in the parameters before the first step
    return forward + (FLOAT * params,) * (steps - 1) + (FLOAT * meta,) * steps


# The times are those of the measurements below, of one core, and of a GPU at 100 TFLOP/s.
WAYS = [
    Way(
        "MAML: 1,024 tasks, conv-4 (112,000 parameters), 35 ms a task on a core",
        shared=1024 * 35e-3,
        own=5e-3,
        messages=(FLOAT * 112e3, FLOAT * 1024),
        parts=1024,
    ),
    Way(
        "MAML: 1,024 tasks, MLP (1,761 parameters), 0.16 ms a task on a core",
        shared=1024 * 0.16e-3,
        own=2e-3,
        messages=(FLOAT * 1761, FLOAT * 1024),
        parts=1024,
    ),
    Way(
        "PES with seeds: 4,096 pairs, 25 ms each on a core (578 parameters)",
        shared=4096 * 25e-3,
        own=4096 * 0.2e-3,  # every rank draws all tasks and makes all of the noise
        messages=(16 * 4096,),
        parts=4096,
    ),
    Way(
        "SAMA: 110 million parameters, 4 inner steps, 60 ms a gradient",
        shared=8 * 60e-3,
        own=10e-3,
        messages=sama(110e6, 1e3, 4),
        hidden=6 * 40e-3,  # backward passes, two thirds of a gradient
        late=(FLOAT, fill_buckets(FLOAT * 110e6)[-1]) * 6 + (FLOAT, FLOAT * 1e3) * 2,
        grows=True,
    ),
    Way(
        "the same, if each gradient were sent after its backward pass",
        shared=8 * 60e-3,
        own=10e-3,
        messages=(FLOAT, FLOAT * 110e6) * 6 + (FLOAT, FLOAT * 1e3) * 2,
        grows=True,
    ),
    Way(
        "Backprop through 4 steps of the same",
        shared=(5 + 4 * 2) * 60e-3,
        own=10e-3,
        messages=backprop(110e6, 1e3, 4),
        grows=True,
    ),
    Way(
        "sharded, SAMA: 7 billion parameters, 1 inner step, 0.9 s a gradient",
        shared=5 * 0.9,
        own=5e-3,
        # gathered on the way and on the way back, and reduced: 3 halves of a sum, of 32 layers
        messages=(2 * 7e9 / 32,) * (32 * 5 * 3 // 2),
        hidden=5 * 0.9,
        grows=True,
    ),
]


def predict() -> str:
    """Return the table of predictions."""
    rows = []
    for way in WAYS:
        for network in (ETHERNET, NVLINK):
            row = [way.name, network.name, len(way.messages), f"{sum(way.messages):.2g}"]
            for ranks in RANKS:
                fits = way.parts is None or ranks <= way.parts
                row.append(f"{way.efficiency(ranks, network):.0%}" if fits else "-")
            limit = way.limit(network)
            rows.append([*row, "none found" if limit >= 2**20 else f"{limit:,}"])
    headers = ["", "network", "messages", "bytes", *(f"{n:,} ranks" for n in RANKS), "half at"]
    return tabulate(rows, headers, tablefmt="github")


# Measured by two processes.


@contextmanager
def counted(sent: list[int]) -> Iterator[None]:
    """While entered, note the bytes of each message."""
    send: Callable[..., Any] = dist.all_reduce

    def note(message: Tensor, *args: Any, **kwargs: Any) -> Any:
        sent.append(message.numel() * message.element_size())
        return send(message, *args, **kwargs)

    dist.all_reduce = note
    try:
        yield
    finally:
        dist.all_reduce = send


def fit_network(ranks: mo.Ranks, repeats: int = 30) -> tuple[float, float, str]:
    """Return (latency, bandwidth, a table) of sums over two ranks, the fastest of each size."""
    sizes, times = [2**k for k in range(2, 25, 2)], []
    for size in sizes:
        message, best = torch.zeros(size // FLOAT), math.inf
        for _ in range(repeats):
            begin = time.perf_counter()
            sum_over_ranks(message, ranks)
            best = min(best, time.perf_counter() - begin)
        times.append(best)
    # relative least squares of t = 2 latency + size / bandwidth: all sizes count alike
    weights = 1 / torch.tensor(times, dtype=torch.float64)
    rows = torch.tensor([[2.0, size] for size in sizes], dtype=torch.float64) * weights[:, None]
    found = torch.linalg.lstsq(rows, torch.ones(len(sizes), 1, dtype=torch.float64)).solution
    latency, per_byte = found[:, 0].tolist()
    fitted = [2 * latency + per_byte * size for size in sizes]
    table = [
        [size, f"{1e6 * t:.0f}", f"{1e6 * f:.0f}"]
        for size, t, f in zip(sizes, times, fitted, strict=True)
    ]
    headers = ["bytes", "measured, us", "fitted, us"]
    return latency, 1 / per_byte, tabulate(table, headers, tablefmt="github")


def count_messages() -> list[list[Any]]:
    """Return rows of (a step, its messages, their bytes, both by the formula)."""
    torch.manual_seed(0)
    model, weights = nn.Linear(20, 5), nn.Linear(1, 1)
    p, m = 105, 2
    batch = (torch.randn(8, 20), torch.randint(5, (8,)))

    def learner_loss(levels: Any, batch: Any) -> Tensor:
        losses = F.cross_entropy(levels.learner(batch[0]), batch[1], reduction="none")
        return (levels.weights(losses.detach()[:, None]).sigmoid()[:, 0] * losses).mean()

    def meta_loss(levels: Any, batch: Any) -> Tensor:
        return F.cross_entropy(levels.learner(batch[0]), batch[1])

    def graph(rule: Any) -> mo.LevelGraph:
        learner = mo.Level("learner", model, learner_loss, SGD(0.1), [batch])
        top = mo.Level("weights", weights, meta_loss, Adam(1e-3), [batch])
        return mo.LevelGraph([mo.Edge(top, learner, steps=4, differentiate=rule)])

    tasks, pairs = 6, 8
    optimizer = MLPOptimizer(hidden_size=4)
    q = sum(one.numel() for one in optimizer.parameters())
    family = mo.tasks.Quadratics()

    def train(estimator: Any) -> mo.MetaTraining:
        return mo.MetaTraining(optimizer, family, estimator=estimator, outer=Adam(), horizon=4)

    net = mo.functional(model)

    def maml() -> None:
        meta_gradient(net.params, (batch[0].expand(tasks, 8, 20), batch[1].expand(tasks, 8)))

    meta_gradient = mo.meta_grad(
        lambda w, task: F.cross_entropy(net(w, task[0]), task[1]), chunk_size=1
    )
    steps = {
        "meta_grad, 6 tasks": (maml, (FLOAT * p, FLOAT * tasks)),
        "FullUnroll, 6 tasks": (train(mo.FullUnroll(tasks)).step, (2 * FLOAT * tasks, FLOAT * q)),
        "PES, 8 pairs": (train(mo.PES(0.01, pairs, window=2)).step, (16 * pairs,)),
        # with each of the two tensors, a number that says whether it is there
        "levels, SAMA, 4 inner steps": (graph(mo.SAMA()).step, sama(p + 2, m + 2, 4)),
        "levels, Backprop, 4 inner steps": (graph(mo.Backprop()).step, backprop(p, m, 4)),
    }
    rows = []
    for name, (step, wanted) in steps.items():
        step()  # the first one also looks whether the ranks are alike
        sent: list[int] = []
        with counted(sent):
            step()
        rows.append([name, len(sent), sum(sent), len(wanted), round(sum(wanted))])
    return rows


def main(measure: bool = False, speed_up: bool = False, overlap: bool = False) -> None:
    """Print the tables.

    Args:
        measure: measure the network between the ranks of this job, and count messages.
        speed_up: time two processes against one, a minute if both cores are free.
        overlap: time gradients whose sums are sent beside the backward pass, two minutes.
    """
    torch.set_num_threads(1)
    if not (measure or speed_up or overlap):
        print(predict())
        return
    with mo.join_ranks() as ranks:
        if not ranks.are_many:
            raise SystemExit("There is one process. Start two: torchrun --nproc-per-node 2 ...")
        tables = []
        if measure:
            latency, bandwidth, table = fit_network(ranks)
            tables += [table, f"latency {1e6 * latency:.0f} us, {bandwidth / 1e9:.2f} GB/s"]
            headers = ["a step of", "messages", "bytes", "by the formula", "bytes by the formula"]
            tables.append(tabulate(count_messages(), headers, tablefmt="github"))
        if speed_up:
            tables.append(measure_speed_up(ranks))
        if overlap:
            tables.append(measure_overlap(ranks))
        if ranks.rank == 0:
            print("\n\n".join(tables))


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
