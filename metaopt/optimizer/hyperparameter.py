"""What may stand for a hyperparameter: a number, a tensor, a parameter, a schedule, or a dict.

The dict goes from patterns of the parameters' names to these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metaopt.checks import Limits
from metaopt.optimizer.by_name import ByName, Value
from metaopt.optimizer.module import note_limits, store
from metaopt.optimizer.schedule import Schedule

Hyperparameter = Value | Schedule | ByName | Mapping[str, Any]


def set_hyperparameter(
    owner: nn.Module,
    name: str,
    value: Any,
    *,
    low: float = 0.0,
    high: float = math.inf,
    below: float = math.inf,
) -> None:
    """Store `value` as an attribute: numbers are checked, and a tensor becomes a buffer.

    A module is registered. A dict with patterns of names becomes a `ByName`, of an optimizer only.

    Raises:
        ValueError: a number or an entry outside low <= value <= high, value < below.
        TypeError: none of the kinds above, or a tensor that is not real and floating-point.
    """
    limits = Limits(low, high, below)
    if isinstance(value, Mapping | ByName) and not isinstance(owner, Schedule):
        by_name = value if isinstance(value, ByName) else ByName(value)
        for place, (pattern, item) in enumerate(by_name.values.items()):
            _check(owner, f"{name}[{pattern!r}]", item, limits)
            note_limits(by_name, f"value{place}", limits)
        setattr(owner, name, by_name)
        return
    _check(owner, name, value, limits)
    store(owner, name, value)
    note_limits(owner, name, limits)


def set_value(
    owner: nn.Module,
    name: str,
    value: Any,
    *,
    high: float = math.inf,
    below: float = math.inf,
) -> None:
    """Store a number, tensor or parameter that is the same at every step.

    Raises:
        ValueError: a number or an entry outside 0 <= value <= high, value < below.
        TypeError: none of the kinds above, or a tensor that is not real and floating-point.
    """
    if isinstance(value, Schedule):
        raise TypeError(
            f"{type(owner).__name__}: `{name}` must be a number, a tensor or an nn.Parameter, got "
            f"the schedule {type(value).__name__}. Put schedules one after the other with "
            "`Joined`, or write a `Schedule` of your own."
        )
    limits = Limits(high=high, below=below)
    _check(owner, name, value, limits, takes="a number, a tensor or an nn.Parameter")
    store(owner, name, value)
    note_limits(owner, name, limits)


def is_zero(value: Hyperparameter) -> bool:
    """Return True for the number 0; a tensor never is, since it may be learned."""
    return isinstance(value, float) and value == 0.0


def is_zero_anywhere(value: Hyperparameter) -> bool:
    """Return True for the number 0, and for a dict that gives it to some of the parameters."""
    return any(map(is_zero, value.values.values())) if isinstance(value, ByName) else is_zero(value)


def _check(
    owner: nn.Module,
    name: str,
    value: Any,
    limits: Limits,
    takes: str = "a number, a tensor, an nn.Parameter or a Schedule",
) -> None:
    if isinstance(value, Schedule):
        return
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(
            f"{type(owner).__name__}: `{name}` must be {takes}, got {type(value).__name__}."
        )
    limits.check(owner, name, value)
