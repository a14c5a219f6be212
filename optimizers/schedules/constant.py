"""A schedule that does not change."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import Value, set_value

from .of_time import OfTime


class Constant(OfTime):
    """value_t = value.

    Args:
        value: a number, tensor or parameter.
    """

    value: Value

    def __init__(self, value: Value):
        super().__init__()
        set_value(self, "value", value)

    def at(self, t: Tensor) -> Value:
        return self.value
