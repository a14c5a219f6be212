"""Rows of pieces, of which each has its turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.optimizer import Schedule, Value

from ..scalars import scalar_dtype


def find_in_turn(
    values: Sequence[Value] | Tensor, boundaries: Sequence[int], step: Tensor, like: Tensor
) -> Tensor:
    """Return values[i] where boundaries[i - 1] <= step < boundaries[i]."""
    dtype = scalar_dtype(like)
    value, *others = [torch.as_tensor(one, dtype=dtype, device=step.device) for one in values]
    for boundary, other in zip(boundaries, others, strict=True):
        value = torch.where(step < boundary, value, other)
    return value


def check_boundaries(owner: Schedule, what: str, pieces: Any, boundaries: Any) -> tuple[int, ...]:
    """Return `boundaries` as a tuple.

    Raises:
        ValueError: they are not increasing positive integers, or there is not one more piece than
            boundaries.
    """
    name = type(owner).__name__
    row = boundaries if isinstance(boundaries, tuple | list) else (None,)
    if not all(type(b) is int and b > a for a, b in zip((0, *row), row, strict=False)):
        raise ValueError(
            f"{name}: `boundaries` must be increasing positive integers, got {boundaries!r}. Write "
            "(30, 60)."
        )
    if len(pieces) != len(row) + 1:
        raise ValueError(
            f"{name}: `{what}` must be one more than the boundaries, got {len(pieces)} and "
            f"{len(row)}."
        )
    return tuple(row)


def check_row(owner: Schedule, name: str, value: Any) -> Any:
    """Return a tuple or list as a tuple, or a tensor with one axis; at least one entry.

    Raises:
        TypeError: it is something else.
        ValueError: it is empty, or a tensor with another number of axes.
    """
    kind = type(owner).__name__
    if isinstance(value, Tensor):
        if value.ndim != 1 or not len(value):
            raise ValueError(
                f"{kind}: `{name}` must have one axis with at least one entry, got shape "
                f"{tuple(value.shape)}."
            )
        return value
    if not isinstance(value, tuple | list):
        raise TypeError(
            f"{kind}: `{name}` must be a tuple, got {type(value).__name__}. Write {name}=(0.1, "
            "0.01)."
        )
    if not value:
        raise ValueError(f"{kind}: `{name}` must not be empty, got {value!r}.")
    return tuple(value)
