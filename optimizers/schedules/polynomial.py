"""Polynomial decay."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Value, set_value

from .of_time import OfTime, fraction


class Polynomial(OfTime):
    """value_t = final + (initial - final) (1 - t / steps)^power, and `final` from t = steps on.

    Equal to `torch.optim.lr_scheduler.PolynomialLR`, which has final = 0.

    Args:
        initial: the value at step 0.
        steps: length of the decay, in steps.
        power: of the remaining fraction; 1 is linear.
        final: the value at its end.

    Raises:
        ValueError: `steps` is not a positive integer, or a number is below 0.
    """

    initial: Value
    power: Value
    final: Value

    def __init__(self, initial: Value, steps: int, *, power: Value = 1.0, final: Value = 0.0):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "power", power)
        set_value(self, "final", final)
        self.steps = check_count(self, "steps", steps)

    def at(self, t: Tensor) -> Value:
        remaining = 1 - fraction(t, self.steps)
        going = remaining > 0
        # 1 in place of 0 keeps the logarithm of 0 out of the second derivative with respect to the
        # power.
        decay = torch.where(going, torch.where(going, remaining, 1) ** self.power, 0)
        return self.final + (self.initial - self.final) * decay
