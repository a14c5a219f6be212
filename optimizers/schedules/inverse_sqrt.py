"""Decay with the inverse square root of the step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer.hyperparameter import Value, set_value
from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype


class InverseSqrt(Schedule):
    """value_t = initial sqrt(steps / max(t, steps)): constant at first, then halved whenever t is
    four times as large.

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

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        later = step.clamp(min=self.steps).to(scalar_dtype(grads[0]))
        return self.initial * (self.steps / later).sqrt(), state
