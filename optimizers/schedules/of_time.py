"""Schedules that depend on time alone."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaopt.optimizer import Schedule, Value

from ..scalars import precise


class OfTime(Schedule):
    """A function of the step t: it observes nothing and remembers nothing."""

    def at(self, t: Tensor) -> Value:
        """Return the value at step t, a scalar in the precision of numbers that are computed."""
        raise TypeError(f"{type(self).__name__} must define `at(t)`.")

    def forward(
        self, state: Any, *, step: Tensor, grads: list[Tensor], **_: Any
    ) -> tuple[Value, Any]:
        return self.at(precise(step, grads[0])), state


def fraction(t: Tensor, steps: int) -> Tensor:
    """Return min(t / steps, 1): how much of a schedule is over."""
    return (t / steps).clamp(max=1)


def half_wave(initial: Value, final: Value, over: Tensor) -> Value:
    """Return final + (initial - final) (1 + cos(pi over)) / 2: `initial` at 0, `final` at 1."""
    return final + (initial - final) * (1 + torch.cos(math.pi * over)) / 2
