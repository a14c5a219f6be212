"""Other values in parameters for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def swapped(places: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Put values into parameters in place, and their own ones back at the end.

    Args:
        places: (a parameter, its value meanwhile).
    """
    own = [param.detach().clone() for param, _ in places]
    try:
        _write([(param, value) for param, value in places if value is not param])
        yield
    finally:
        _write([(param, value) for (param, _), value in zip(places, own, strict=True)])


@torch.no_grad()
def _write(places: Sequence[tuple[Tensor, Tensor]]) -> None:
    for param, value in places:
        param.copy_(value)
