"""Decay with the inverse square root of the step."""

from __future__ import annotations

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Value, set_value

from .of_time import OfTime


class InverseSqrt(OfTime):
    """value_t = initial sqrt(steps / max(t, steps)).

    It is constant at first, then halved whenever t is four times as large.
    `Warmup(InverseSqrt(peak, steps), steps)` is the schedule of the Transformer, peak min(t /
    steps, sqrt(steps / t)), where peak is 1 / sqrt(width steps).

    Args:
        initial: the value up to t = steps.
        steps: the step at which the decay begins.

    Raises:
        ValueError: `steps` is not a positive integer, or a number is below 0.

    Reference:
        Raffel et al., JMLR 21, 2020, arXiv:1910.10683, section 3.1.2; with warm-up: Vaswani et al.
        2017, arXiv:1706.03762, eq. 3.
    """

    initial: Value

    def __init__(self, initial: Value, steps: int):
        super().__init__()
        set_value(self, "initial", initial)
        self.steps = check_count(self, "steps", steps)

    def at(self, t: Tensor) -> Value:
        return self.initial * (self.steps / t.clamp(min=self.steps)).sqrt()
