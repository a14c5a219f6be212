"""Telling somebody of each step of each level, while the graph runs.

What is told are the steps that the graph keeps. Those that a derivative takes beside them are not:
made again on the way back, made ahead of the real ones, or made at other parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.torch_internals import is_in_backward
from metaopt.transforms import outside_transforms, unwrap

# (level, number of its steps so far, its loss and metrics by name)
OnStep = Callable[[str, int, dict[str, Tensor]], object]


@dataclass
class _Listener:
    """Who is told, and the number of steps of each level so far."""

    on_step: OnStep
    counts: dict[str, int]


_LISTENER: ContextVar[_Listener | None] = ContextVar("listener", default=None)


@contextmanager
def telling(on_step: OnStep | None, counts: dict[str, int]) -> Iterator[None]:
    """While entered, `on_step` is told of each step; None for nobody.

    Args:
        on_step: see `LevelGraph.step`.
        counts: number of steps of each level so far; moved on.
    """
    token = _LISTENER.set(None if on_step is None else _Listener(on_step, counts))
    try:
        yield
    finally:
        _LISTENER.reset(token)


def untold() -> AbstractContextManager[None]:
    """While entered, steps are made that the graph does not keep."""
    return nullcontext() if torch.compiler.is_compiling() else telling(None, {})


def tell_step(level: str, loss: Tensor, metrics: Mapping[str, Tensor]) -> None:
    """Tell of a step, unless nobody listens, or it is one that is made again on the way back.

    No value is read here. What is told has no graph, and memory of its own, since a metric may be
    a parameter; of copies under `vmap` it is the row of all.
    """
    listener = None if torch.compiler.is_compiling() else _LISTENER.get()
    if listener is None or is_in_backward():
        return
    listener.counts[level] += 1
    told = {"loss": loss, **metrics}
    plain = {name: unwrap(value).detach().clone() for name, value in told.items()}
    with outside_transforms(), torch.no_grad():
        listener.on_step(level, listener.counts[level], plain)


def each_copy(copies: int) -> Iterator[int]:
    """Yield the index of each copy, whose steps are then numbered like those of the first."""
    listener = _LISTENER.get()
    before = {} if listener is None else dict(listener.counts)
    for i in range(copies):
        if listener is not None:
            listener.counts = dict(before)
        yield i
