"""Linear change."""

from __future__ import annotations

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Value, set_value

from .of_time import OfTime, fraction


class Linear(OfTime):
    """value_t = initial + (final - initial) t / steps, and `final` from t = steps on.

    Equal to `torch.optim.lr_scheduler.LinearLR` with the factors initial / lr and final / lr.

    Args:
        initial: the value at step 0.
        steps: length of the change, in steps.
        final: the value at its end.

    Raises:
        ValueError: `steps` is not a positive integer.
    """

    initial: Value
    final: Value

    def __init__(self, initial: Value, steps: int, *, final: Value = 0.0):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "final", final)
        self.steps = check_count(self, "steps", steps)

    def at(self, t: Tensor) -> Value:
        return self.initial + (self.final - self.initial) * fraction(t, self.steps)
