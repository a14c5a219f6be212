"""Decay in equal stairs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer.hyperparameter import Value, set_value
from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype


class Staircase(Schedule):
    """value_t = initial gamma^floor(t / every). Equal to `torch.optim.lr_scheduler.StepLR`.

    Args:
        initial: the value at step 0.
        every: length of a stair, in steps.
        gamma: factor per stair.

    Raises:
        ValueError: `every` is not a positive integer, or a number is below 0.
    """

    initial: Value
    gamma: Value

    def __init__(self, initial: Value, every: int, *, gamma: Value = 0.1):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "gamma", gamma)
        self.every = check_count(self, "every", every)

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        stairs = step.div(self.every, rounding_mode="floor")
        return self.initial * self.gamma ** stairs.to(scalar_dtype(grads[0])), state
