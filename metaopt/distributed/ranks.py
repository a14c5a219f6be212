"""The processes that share the work: who they are, and how a script joins them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from metaopt import tree
from metaopt.checks import check_positive
from metaopt.tree import Tree


@dataclass(frozen=True)
class Ranks:
    """The processes of a job, and which of them this one is.

    Work of n equal parts is shared in the order of ranks: rank r has the rows n r / size, ...,
    n (r + 1) / size - 1, rounded down.

    Attributes:
        rank: of this process, 0 to size - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def are_many(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def part(self, count: int) -> slice:
        """Return which of `count` rows are this rank's."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def own(self, rows: Tree) -> Tree:
        """Return this rank's rows of every leaf."""
        if not self.are_many:
            return rows
        return tree.map(lambda leaf: leaf[self.part(len(leaf))], rows)

    def share(self, count: int, what: str) -> slice:
        """Return which of `count` things are this rank's.

        Raises:
            ValueError: there are fewer than ranks; some would have nothing to do.
        """
        if count < self.size:
            raise ValueError(
                f"{count} {what} cannot be shared by {self.size} ranks: {self.size - count} would "
                f"have none. Take at least {self.size}, best a multiple of it, or start fewer "
                f"processes: `torchrun --nproc-per-node {max(count, 1)}`."
            )
        return self.part(count)


ALONE = Ranks()
_CURRENT: ContextVar[Ranks | None] = ContextVar("ranks", default=None)
_IS_BUSY: ContextVar[bool] = ContextVar("is_busy", default=False)


def current_ranks() -> Ranks:
    """Return the ranks that share what is computed now; one alone outside of `join_ranks`.

    While a compiler traces, which cannot ask, it is one: then every rank does all of the work.

    Warns:
        RuntimeWarning: there are other ranks, and nothing is shared.
    """
    if torch.compiler.is_compiling() or _IS_BUSY.get():
        return ALONE
    ranks = _CURRENT.get()
    if ranks is None and dist.is_available() and dist.is_initialized():
        size = dist.get_world_size()
        if size > 1:
            warnings.warn(
                f"torch.distributed runs with {size} ranks, but what is computed here is not "
                "shared, and its gradients are those of this rank. Write `with mo.join_ranks():` "
                "around it.",
                RuntimeWarning,
                stacklevel=3,
            )
    return ranks or ALONE


def is_shared() -> bool:
    """Return True if ranks that were joined share what is computed now."""
    ranks = _CURRENT.get()
    return ranks is not None and ranks.are_many and not _IS_BUSY.get()


def is_busy() -> bool:
    """Return True while this rank works on a part of its own, which the others do not know."""
    return _IS_BUSY.get()


@contextmanager
def work_alone() -> Iterator[None]:
    """While entered, nothing is shared: this rank works on its own part of something."""
    token = _IS_BUSY.set(True)
    try:
        yield
    finally:
        _IS_BUSY.reset(token)


@contextmanager
def join_ranks(*, timeout: float = 600.0) -> Iterator[Ranks]:
    """While entered, share work with the other processes of the job.

    `torchrun` starts a script several times, each as a rank. Inside of this context `meta_grad`,
    `MetaTraining` and `LevelGraph` share their tasks, pairs and batches over the ranks, and all
    ranks come to the same result. Every rank runs the same script with the same seeds: it makes
    the same models and draws the same data, and works on its part of them. In a process that
    was not started in this way, nothing changes:

        with mo.join_ranks() as ranks:
            training = mo.MetaTraining(...)

    CPU tensors are exchanged by gloo, those on GPUs by NCCL; each process has the GPU of its local
    rank. A process group that is there already is used, and left.

    Args:
        timeout: seconds that a rank waits for another before it gives up.

    Raises:
        ValueError: the timeout is not positive.
        RuntimeError: another rank cannot be reached.
    """
    limit = timedelta(seconds=check_positive("join_ranks", "timeout", timeout))
    was_there = dist.is_available() and dist.is_initialized()
    if not was_there and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _open_store(rank, size, limit)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    is_shared = dist.is_available() and dist.is_initialized()
    ranks = Ranks(dist.get_rank(), dist.get_world_size()) if is_shared else ALONE
    token = _CURRENT.set(ranks)
    try:
        yield ranks
    finally:
        _CURRENT.reset(token)
        if is_shared and not was_there:
            # Also after an error: the others then hear that this rank is gone, and end too.
            dist.destroy_process_group()


def _open_store(rank: int, size: int, timeout: timedelta) -> Any:
    """Return where the ranks tell each other their addresses.

    torchrun keeps one for all attempts of a job. Torch would find the addresses of the attempt
    before in it, and try to reach ranks that are gone: `torchrun --max-restarts` with gloo never
    came back (torch 2.13). So each attempt has names of its own.
    """
    has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(  # type: ignore[attr-defined]  # not among torch's stated exports
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        size,
        is_master=rank == 0 and not has_one,
        timeout=timeout,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return dist.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
