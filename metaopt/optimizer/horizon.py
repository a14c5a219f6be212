"""The number of steps of a whole run, for optimizers and schedules that have to know it."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from metaopt.checks import check_count
from metaopt.torch_internals import children_of, twin_of

M = TypeVar("M", bound=nn.Module)


def with_steps(module: M, steps: int) -> M:
    """Return the optimizer, or schedule, for runs of `steps` steps.

    It has the same parameters, not copies. Whatever in it has to know and was made with
    `steps=None` is told; a number that was given stays. Behind `Accumulate(k, ...)` there are only
    steps / k of them.

    Raises:
        ValueError: `steps` is not positive.
    """
    check_count(None, "steps", steps)
    told: M = _tell(module, steps, {})
    return told


def _tell(module: Any, steps: int, twins: dict[int, Any]) -> Any:
    """Return the twin of a module; one that stands in several places has one twin."""
    if id(module) not in twins:
        twins[id(module)] = twin = twin_of(module)
        if asks_for_steps(module):
            vars(twin)["steps"] = steps
        inside = getattr(module, "steps_inside", lambda steps: steps)(steps)
        for name, child in children_of(module).items():
            if child is not None:
                children_of(twin)[name] = _tell(child, inside, twins)
    return twins[id(module)]


def asks_for_steps(module: nn.Module) -> bool:
    """Return True if a module itself has to know the number of steps, and was not told."""
    return bool(getattr(module, "needs_steps", False)) and module.steps is None


def require_steps(owner: nn.Module) -> int:
    """Return the number of steps that it was told.

    Raises:
        ValueError: none was.
    """
    if asks_for_steps(owner):
        name = type(owner).__name__
        raise ValueError(
            f"{name} must know the number of steps of the run, got steps=None. Make it with "
            f"`{name}(steps=1000)`, or let `mo.with_steps(optimizer, 1000)` tell it."
        )
    steps: int = vars(owner)["steps"]
    return steps
