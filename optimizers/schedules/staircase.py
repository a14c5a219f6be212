"""Decay in equal stairs."""

from __future__ import annotations

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Value, set_value

from .of_time import OfTime


class Staircase(OfTime):
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

    def at(self, t: Tensor) -> Value:
        return self.initial * self.gamma ** t.div(self.every, rounding_mode="floor")
