"""What may stand for a hyperparameter: a number, a tensor, a parameter or a schedule."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from metaopt.optimizer.schedule import Schedule

Value = float | Tensor
Hyperparameter = Value | Schedule


def set_hyperparameter(
    owner: nn.Module, name: str, value: Any, *, low: float = 0.0, high: float = math.inf, below: float = math.inf
) -> None:
    """Store `value` as an attribute of `owner`: a number is checked, a tensor becomes a buffer, a module is registered.

    Raises:
        ValueError: a number outside low <= value <= high, value < below.
        TypeError: none of the kinds above.
    """
    kind = type(owner).__name__
    if isinstance(value, nn.Parameter | Schedule):
        setattr(owner, name, value)
    elif isinstance(value, Tensor):
        owner.register_buffer(name, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not (low <= value <= high and value < below):
            limit = f"[{low}, {below})" if math.isfinite(below) else f"[{low}, {high}]"
            raise ValueError(f"{kind}: `{name}` must lie in {limit}, got {value}.")
        setattr(owner, name, float(value))
    else:
        raise TypeError(f"{kind}: `{name}` must be a number, a tensor, an nn.Parameter or a Schedule, got {type(value).__name__}.")


def is_zero(value: Hyperparameter) -> bool:
    """Say whether a hyperparameter is the number 0; a tensor never is, since it may be learned."""
    return isinstance(value, float) and value == 0.0
