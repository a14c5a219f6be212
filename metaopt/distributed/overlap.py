"""Sums over ranks of gradients, sent while the backward pass still runs.

A gradient of which nobody takes a derivative needs no record of its sum. In it, every parameter
has a copy that is a leaf of the graph, and the gradient of a leaf is complete long before the pass
ends: what is used last comes first. The copies fill buckets, from the last parameter to the first,
and a full bucket is on its way while the pass goes on, as in torch's `DistributedDataParallel` (Li
et al. 2020, arXiv:2006.15704, section 3.2).

All ranks send the same buckets in the same order, whatever arrives first: a bucket starts after
those before it. What one rank's loss does not depend on is sent as zeros when the pass has ended.
Behind the gradients of a bucket is a 1 for each that is there, a 0 for each that is not: their sum
tells a gradient of zeros from one that no rank has.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial

import torch
from torch import Tensor

from metaopt.distributed.message import Sending, start_sum

# Bytes after which a bucket is full, those of `DistributedDataParallel`: the first is on its way
# soon. What is smaller is one message.
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20

Slopes = Sequence[Tensor | None]
_RUNNING: ContextVar[OverlappedSums | None] = ContextVar("overlapped sums", default=None)


def running_sums() -> OverlappedSums | None:
    """Return the sums of the gradient that is being taken, if it is one without a derivative."""
    return None if torch.compiler.is_compiling() else _RUNNING.get()


class OverlappedSums:
    """Copies of the variables of one gradient for the ranks, and the sums of their cotangents.

    While entered, `copy_beside_backward` returns these copies of the variables.

    Args:
        variables: leaves, whose gradient has no derivative.

    Attributes:
        copies: of the variables, leaves too.
        is_alone: whether nothing else is sent in this backward pass. Otherwise the buckets start
            when it has ended: their place among other messages would depend on what a rank's loss
            depends on.
    """

    def __init__(self, variables: Sequence[Tensor]):
        self.variables = variables
        self.copies = [leaf.detach().requires_grad_() for leaf in variables]
        self.is_alone = True
        self._places = {id(leaf): place for place, leaf in enumerate(variables)}
        self._used: set[int] = set()
        self._buckets: list[_Bucket] = []
        self._started = 0
        self._lock = threading.Lock()  # autograd has a thread for each device

    def __enter__(self) -> None:
        self._before = _RUNNING.set(self)

    def __exit__(self, *_: object) -> None:
        _RUNNING.reset(self._before)

    def copy(self, leaves: Sequence[Tensor]) -> list[Tensor] | None:
        """Return the copies of some variables; None if there is anything else among them."""
        places = [self._places.get(id(leaf)) for leaf in leaves]
        known = [place for place in places if place is not None]
        if len(known) < len(places):
            return None
        self._used.update(known)
        return [self.copies[place] for place in known]

    def differentiate(self, backward: Callable[[list[Tensor]], Slopes]) -> Slopes:
        """Return the derivatives in the variables, with the sums of those in their copies.

        Args:
            backward: leaves of the graph -> the derivatives in them; None where there is none.

        Returns:
            None for a variable that no rank's loss depends on.
        """
        self._buckets = self._fill_buckets()
        hooks = [
            self.copies[place].register_hook(partial(self._arrive, bucket, place))
            for bucket in self._buckets
            for place in bucket.missing
        ]
        try:
            found = backward([*self.variables, *self.copies])
        finally:
            for hook in hooks:
                hook.remove()
        for bucket in self._buckets:
            for place in sorted(bucket.missing):
                bucket.put(place, None)
        self._start_full()
        total = list(found[: len(self.variables)])
        for bucket in self._buckets:
            for place, part in bucket.wait().items():
                own = total[place]  # of what did not go through the copy
                if own is None or part is None:
                    total[place] = own if part is None else part
                else:
                    total[place] = own + part
        return total

    def _fill_buckets(self) -> list[_Bucket]:
        full: list[_Bucket] = []
        filling: dict[tuple[torch.dtype, torch.device], _Bucket] = {}
        for place in sorted(self._used, reverse=True):
            leaf = self.copies[place]
            kind = (leaf.dtype, leaf.device)
            if kind in filling and leaf.nbytes >= BUCKET:  # what is ready does not wait for it
                full.append(filling.pop(kind))
            bucket = filling.setdefault(kind, _Bucket())
            bucket.add(place, leaf)
            if bucket.size >= (BUCKET if full else FIRST_BUCKET):
                full.append(filling.pop(kind))
        return [*full, *filling.values()]

    def _arrive(self, bucket: _Bucket, place: int, grad: Tensor) -> Tensor:
        """Put a gradient into its bucket. Return where its sum will be: nobody reads it before."""
        with self._lock:
            part = bucket.put(place, grad)
            if self.is_alone:
                self._start_full()
        return part

    def _start_full(self) -> None:
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._buckets[self._started].start()
            self._started += 1


class _Bucket:
    """Gradients of one dtype and device that are one message."""

    def __init__(self) -> None:
        self.missing: set[int] = set()  # places
        self.size = 0  # bytes
        self._leaves: dict[int, Tensor] = {}  # place -> whose gradient
        self._parts: dict[int, Tensor] = {}  # place -> its part of the message
        self._holders: dict[int, Tensor] = {}  # place -> of how many ranks it is the sum
        self._absent: list[int] = []  # places without a gradient on this rank
        self._message: Tensor | None = None
        self._sending: Sending | None = None

    def add(self, place: int, leaf: Tensor) -> None:
        self.missing.add(place)
        self.size += leaf.nbytes
        self._leaves[place] = leaf

    def put(self, place: int, grad: Tensor | None) -> Tensor:
        """Write a gradient into the message, zeros for None. Return its part of the message."""
        if self._message is None:  # made late, when the pass has given memory back
            sizes = [leaf.numel() for leaf in self._leaves.values()]
            like, count = self._leaves[place], len(sizes)
            self._message = torch.empty(sum(sizes) + count, dtype=like.dtype, device=like.device)
            *parts, holders = self._message.split([*sizes, count])
            named = zip(self._leaves.items(), parts, strict=True)
            self._parts = {place: part.view(leaf.shape) for (place, leaf), part in named}
            self._holders = dict(zip(self._leaves, holders.fill_(1), strict=True))
        part = self._parts[place]
        if grad is None:
            part.zero_()
            self._holders[place].zero_()
            self._absent.append(place)
        else:
            part.copy_(grad)
        self.missing.discard(place)
        return part

    def start(self) -> None:
        assert self._message is not None  # a bucket has a gradient
        self._sending = start_sum(self._message)

    def wait(self) -> dict[int, Tensor | None]:
        """Return place -> sum of the gradients, when it is there; None if no rank has one."""
        assert self._sending is not None  # all have started
        self._sending.wait()
        # what this rank has is not asked for: that would wait for the device
        nowhere = {place for place in self._absent if not self._holders[place]}
        return {place: None if place in nowhere else part for place, part in self._parts.items()}
