"""How much of a schedule is over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype


def check_steps(owner: Schedule, steps: int) -> int:
    """Return `steps`.

    Raises:
        ValueError: it is not a positive integer.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{type(owner).__name__}: `steps` must be a positive integer, got {steps!r}.")
    return steps


def fraction(step: Tensor, steps: int, like: Tensor) -> Tensor:
    """Return min(step / steps, 1)."""
    return (step.to(scalar_dtype(like)) / steps).clamp(max=1)


def check_boundaries(owner: Schedule, what: str, pieces: Any, boundaries: Any) -> tuple[int, ...]:
    """Return `boundaries` as a tuple.

    Raises:
        ValueError: they are not increasing positive integers, or there is not one more piece than boundaries.
    """
    name, boundaries = type(owner).__name__, tuple(boundaries)
    if not all(isinstance(b, int) and b > a for a, b in zip((0, *boundaries), boundaries, strict=False)):
        raise ValueError(f"{name}: `boundaries` must be increasing positive integers, got {boundaries}.")
    if len(pieces) != len(boundaries) + 1:
        raise ValueError(f"{name}: `{what}` must be one more than the boundaries, got {len(pieces)} and {len(boundaries)}.")
    return boundaries
