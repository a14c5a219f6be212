"""Cosine decay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer.hyperparameter import Value, set_value
from metaopt.optimizer.schedule import Schedule

from .progress import fraction


class Cosine(Schedule):
    """value_t = final + (initial - final) (1 + cos(pi t / steps)) / 2, and `final` from t = steps
    on.

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

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        over = fraction(step, self.steps, grads[0])
        return self.final + (self.initial - self.final) * (1 + torch.cos(math.pi * over)) / 2, state
