"""Exponential decay."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.optimizer.hyperparameter import Value, set_value
from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype


class Exponential(Schedule):
    """value_t = initial gamma^t. Equal to `torch.optim.lr_scheduler.ExponentialLR`.

    Args:
        initial: the value at step 0.
        gamma: factor per step.

    Raises:
        ValueError: a number below 0.
    """

    initial: Value
    gamma: Value

    def __init__(self, initial: Value, gamma: Value):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "gamma", gamma)

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        return self.initial * self.gamma ** step.to(scalar_dtype(grads[0])), state
