"""Warm-up in front of another schedule."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.checks import check_count
from metaopt.optimizer import Schedule, Value, set_hyperparameter, set_value
from metaopt.optimizer.schedule import advance

from ..scalars import precise
from .of_time import fraction


class Warmup(Schedule):
    """value_t = (start + (1 - start) min(t / steps, 1)) after_t.

    It is a linear ramp on top of what comes after. Both see the same t. Equal to
    `torch.optim.lr_scheduler.LinearLR(start_factor=start, total_iters=steps)` chained with the
    scheduler of `after`.

    Args:
        after: a value, or a schedule.
        steps: length of the ramp, in steps.
        start: the factor at step 0.

    Raises:
        ValueError: `steps` is not a positive integer, or a number is below 0.

    Reference:
        Goyal et al. 2017, arXiv:1706.02677, section 2.2.
    """

    after: Value | Schedule
    start: Value

    def __init__(self, after: Value | Schedule, steps: int, *, start: Value = 0.0):
        super().__init__()
        set_hyperparameter(self, "after", after)
        set_value(self, "start", start)
        self.steps = check_count(self, "steps", steps)

    def init(self, like: Tensor) -> Any:
        return self.after.init(like) if isinstance(self.after, Schedule) else {}

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        if not isinstance(self.after, Schedule):
            return self._ramp(step, grads[0]) * self.after, {}
        value, state = advance(self.after, state, step=step, loss=loss, grads=grads)
        return self._ramp(step, grads[0]) * value, state

    def value_at(self, state: Any, *, step: Tensor, like: Tensor, **seen: Any) -> Value:
        after = self.after
        if isinstance(after, Schedule):
            after = after.value_at(state, step=step, like=like, **seen)
        return self._ramp(step, like) * after

    def _ramp(self, step: Tensor, like: Tensor) -> Value:
        return self.start + (1 - self.start) * fraction(precise(step, like), self.steps)
