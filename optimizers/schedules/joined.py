"""Schedules one after the other."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer.hyperparameter import Value
from metaopt.optimizer.schedule import Schedule, advance

from ..precision import scalar_dtype
from .progress import check_boundaries, check_row


class Joined(Schedule):
    """value_t = schedules[i] at its own step t - boundaries[i - 1], for boundaries[i - 1] <= t <
    boundaries[i].

    Equal to `torch.optim.lr_scheduler.SequentialLR`. All are evaluated at every step, since the
    step is a tensor; only the one whose turn it is goes on in its state.

    Args:
        schedules: one more than boundaries.
        boundaries: the first step of the second schedule, of the third, ...

    Raises:
        ValueError: the boundaries are not increasing positive integers, or the numbers do not fit.
        TypeError: something else than a schedule.
    """

    def __init__(self, schedules: tuple[Schedule, ...], boundaries: tuple[int, ...]):
        super().__init__()
        schedules = check_row(self, "schedules", schedules)
        self.boundaries = check_boundaries(self, "schedules", schedules, boundaries)
        for schedule in schedules:
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"Joined: `schedules` must be schedules, got {type(schedule).__name__}. Wrap a "
                    f"number: `Constant(0.1)`."
                )
        self._pieces = nn.ModuleList(schedules)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules, in turn."""
        return cast(tuple[Schedule, ...], tuple(self._pieces))

    def init(self, like: Tensor) -> Any:
        return [schedule.init(like) for schedule in self.schedules]

    def forward(
        self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]
    ) -> tuple[Value, Any]:
        values, after = [], []
        ends = (*self.boundaries, math.inf)
        for schedule, start, end, before in zip(
            self.schedules, self._starts, ends, state, strict=True
        ):
            value, new = advance(
                schedule, before, step=(step - start).clamp(min=0), loss=loss, grads=grads
            )
            values.append(value)
            turn = (step >= start) & (step < end)
            after.append(tree.map(lambda n, b, turn=turn: torch.where(turn, n, b), new, before))
        return self._in_turn(values, step, grads[0]), after

    def value_at(
        self,
        state: Any,
        *,
        step: Tensor,
        loss: Tensor | None,
        grads: list[Tensor] | None,
        like: Tensor,
    ) -> Value:
        values = [
            schedule.value_at(
                before, step=(step - start).clamp(min=0), loss=loss, grads=grads, like=like
            )
            for schedule, start, before in zip(self.schedules, self._starts, state, strict=True)
        ]
        return self._in_turn(values, step, like)

    @property
    def _starts(self) -> tuple[int, ...]:
        return (0, *self.boundaries)

    def _in_turn(self, values: list[Value], step: Tensor, like: Tensor) -> Tensor:
        """Return the value of the schedule whose turn it is."""
        value, *others = [
            torch.as_tensor(value, dtype=scalar_dtype(like), device=step.device) for value in values
        ]
        for boundary, other in zip(self.boundaries, others, strict=True):
            value = torch.where(step < boundary, value, other)
        return value
