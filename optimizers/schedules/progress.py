"""How much of a schedule is over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype


def fraction(step: Tensor, steps: int, like: Tensor) -> Tensor:
    """Return min(step / steps, 1)."""
    return (step.to(scalar_dtype(like)) / steps).clamp(max=1)


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
            f"(30, 60)."
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
            f"0.01)."
        )
    if not value:
        raise ValueError(f"{kind}: `{name}` must not be empty, got {value!r}.")
    return tuple(value)


def require_loss(owner: Schedule, loss: Tensor | None) -> Tensor:
    """Return the loss that a schedule observes.

    Raises:
        ValueError: it was not given.
    """
    if loss is None:
        raise ValueError(
            f"{type(owner).__name__} observes the loss, got None. Call `optimizer(grads, state, "
            f"params, loss=loss)` or "
            "`step(closure)`."
        )
    return loss
