"""A schedule that does not change."""

from __future__ import annotations

from metaopt.hyperparameter import Value, set_hyperparameter
from metaopt.schedule import Schedule


class Constant(Schedule):
    """value_t = value.

    Args:
        value: a number, tensor or parameter.
    """

    def __init__(self, value: Value):
        super().__init__()
        set_hyperparameter(self, "value", value)

    def forward(self, state, *, step, loss, grads):
        return self.value, state
