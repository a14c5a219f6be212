"""Cosine decay."""

from __future__ import annotations

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Value, set_value

from .of_time import OfTime, fraction, half_wave


class Cosine(OfTime):
    """value_t = final + (initial - final) (1 + cos(pi t / steps)) / 2, then `final`.

    Args:
        initial: the value at step 0.
        steps: length of the decay, in steps.
        final: the value at its end.

    Raises:
        ValueError: `steps` is not positive.

    Reference:
        Loshchilov and Hutter, ICLR 2017, arXiv:1608.03983, equation 5 with one period.
    """

    initial: Value
    final: Value

    def __init__(self, initial: Value, steps: int, *, final: Value = 0.0):
        super().__init__()
        set_value(self, "initial", initial)
        set_value(self, "final", final)
        self.steps = check_count(self, "steps", steps)

    def at(self, t: Tensor) -> Value:
        return half_wave(self.initial, self.final, fraction(t, self.steps))
