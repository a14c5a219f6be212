"""What pullbacks say of themselves: the residual of a solver, and how many steps it made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from metaopt.transforms import values_are_readable


class Gathered:
    """What was said while somebody listened.

    Attributes:
        owner: whose pullback is under way.
        found: "OWNER/NAME" -> the first value that was said.
    """

    def __init__(self) -> None:
        self.owner = ""
        self.found: dict[str, float | Tensor] = {}


_GATHERED: ContextVar[Gathered | None] = ContextVar("gathered", default=None)


@contextmanager
def gathering() -> Iterator[Gathered]:
    """While entered, what pullbacks say is kept."""
    gathered = Gathered()
    token = _GATHERED.set(gathered)
    try:
        yield gathered
    finally:
        _GATHERED.reset(token)


def name_owner(owner: str) -> None:
    """Say whose pullback comes next."""
    gathered = None if torch.compiler.is_compiling() else _GATHERED.get()
    if gathered is not None:
        gathered.owner = owner


def say(statistics: Mapping[str, Tensor]) -> None:
    """Say something, if a pullback with an owner is under way, and outside of transforms."""
    gathered = None if torch.compiler.is_compiling() else _GATHERED.get()
    if gathered is not None and gathered.owner and values_are_readable():
        for name, value in statistics.items():
            gathered.found.setdefault(f"{gathered.owner}/solver {name}", value)
