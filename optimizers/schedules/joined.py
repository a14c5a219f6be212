"""Schedules one after the other."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer import Schedule, Value
from metaopt.optimizer.schedule import advance

from .rows import check_boundaries, check_row, find_in_turn


class Joined(Schedule):
    """value_t = schedules[i] at its own step t - b, b = boundaries[i - 1] <= t < boundaries[i].

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
                    "number: `Constant(0.1)`."
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
        for (schedule, start, before), end in zip(self._pieces_of(state), ends, strict=True):
            own_step = (step - start).clamp(min=0)
            value, new = advance(schedule, before, step=own_step, loss=loss, grads=grads)
            values.append(value)
            turn = (step >= start) & (step < end)
            after.append(tree.map(lambda n, b, turn=turn: torch.where(turn, n, b), new, before))
        return find_in_turn(values, self.boundaries, step, grads[0]), after

    def value_at(self, state: Any, *, step: Tensor, like: Tensor, **seen: Any) -> Value:
        values = [
            schedule.value_at(before, step=(step - start).clamp(min=0), like=like, **seen)
            for schedule, start, before in self._pieces_of(state)
        ]
        return find_in_turn(values, self.boundaries, step, like)

    def _pieces_of(self, state: Any) -> list[tuple[Schedule, int, Any]]:
        """Return (schedule, its first step, its state) in turn."""
        return list(zip(self.schedules, (0, *self.boundaries), state, strict=True))
