"""A schedule that does not change."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.optimizer.hyperparameter import Value, set_value
from metaopt.optimizer.schedule import Schedule


class Constant(Schedule):
    """value_t = value.

    Args:
        value: a number, tensor or parameter.
    """

    value: Value

    def __init__(self, value: Value):
        super().__init__()
        set_value(self, "value", value)

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        return self.value, state
