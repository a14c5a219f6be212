"""Schedules one after the other."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer.hyperparameter import Value
from metaopt.optimizer.schedule import Schedule

from ..precision import scalar_dtype
from .progress import check_boundaries


class Joined(Schedule):
    """value_t = schedules[i] at its own step t - boundaries[i - 1], for boundaries[i - 1] <= t < boundaries[i].

    Equal to `torch.optim.lr_scheduler.SequentialLR`. All are evaluated at every step, since the step is a tensor; only the one
    whose turn it is goes on in its state.

    Args:
        schedules: one more than boundaries.
        boundaries: the first step of the second schedule, of the third, ...

    Raises:
        ValueError: the boundaries are not increasing positive integers, or the numbers do not fit.
        TypeError: something else than a schedule.
    """

    def __init__(self, schedules: tuple[Schedule, ...], boundaries: tuple[int, ...]):
        super().__init__()
        self.boundaries = check_boundaries(self, "schedules", schedules, boundaries)
        for schedule in schedules:
            if not isinstance(schedule, Schedule):
                raise TypeError(
                    f"Joined: `schedules` must be schedules, got {type(schedule).__name__}. Wrap a number: `Constant(0.1)`."
                )
        self._pieces = nn.ModuleList(schedules)

    @property
    def schedules(self) -> tuple[Schedule, ...]:
        """The schedules, in turn."""
        return cast(tuple[Schedule, ...], tuple(self._pieces))

    def init(self, like: Tensor) -> Any:
        return [schedule.init(like) for schedule in self.schedules]

    def forward(self, state: Any, *, step: Tensor, loss: Tensor | None, grads: list[Tensor]) -> tuple[Value, Any]:
        dtype = scalar_dtype(grads[0])
        value: Tensor | None = None
        after = []
        spans = zip((0, *self.boundaries), (*self.boundaries, math.inf), strict=True)
        for schedule, (start, end), before in zip(self.schedules, spans, state, strict=True):
            own, new = schedule(before, step=(step - start).clamp(min=0), loss=loss, grads=grads)
            own = torch.as_tensor(own, dtype=dtype, device=step.device)
            value = own if value is None else torch.where(step < start, value, own)
            turn = (step >= start) & (step < end)
            after.append(tree.map(lambda n, b, turn=turn: torch.where(turn, n, b), new, before))
        assert value is not None
        return value, after
