"""The number of steps of a whole run, for optimizers and schedules that have to know it."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from metaopt.checks import check_count
from metaopt.torch_internals import twin_of

M = TypeVar("M", bound=nn.Module)


def with_steps(module: M, steps: int) -> M:
    """Return the optimizer, or schedule, for runs of `steps` steps.

    It has the same parameters, not copies. Whatever in it was made with `steps=None` is told; a
    number that was given stays.

    Raises:
        ValueError: `steps` is not positive.
    """
    check_count(None, "steps", steps)
    twin = twin_of(module)
    for name, child in module.named_children():
        setattr(twin, name, with_steps(child, steps))
    if getattr(module, "steps", 0) is None:
        vars(twin)["steps"] = steps
    return twin


def require_steps(owner: nn.Module) -> int:
    """Return the number of steps that it was told.

    Raises:
        ValueError: none was.
    """
    steps: int | None = owner.steps  # type: ignore[assignment]
    if steps is None:
        name = type(owner).__name__
        raise ValueError(
            f"{name} must know the number of steps of the run, got steps=None. Make it with "
            f"`{name}(steps=1000)`, or let `mo.with_steps(optimizer, 1000)` tell it."
        )
    return steps
