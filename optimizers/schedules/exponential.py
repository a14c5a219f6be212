"""Exponential decay."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import Value, set_value

from .of_time import OfTime


class Exponential(OfTime):
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

    def at(self, t: Tensor) -> Value:
        return self.initial * self.gamma**t
