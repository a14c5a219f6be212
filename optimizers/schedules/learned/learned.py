"""What learned schedules share: where they start, and how a change acts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.checks import check_choice, check_count, check_number, check_positive
from metaopt.optimizer import Schedule, Value
from metaopt.optimizer.schedule import advance

from .changes import CHANGES, factor


class LearnedSchedule(Schedule):
    """value_t = a start_t exp(change_t); or a start_t positive(1 + change_t) if it is "additive".

    start_t is 1, or the value of a hand-made schedule; a is learned, and kept as its logarithm.
    `positive` is nearly the identity above 0.01, and stays above 0.
    """

    def __init__(self, initial: float | Schedule, steps: int, max_change: float, change: str):
        super().__init__()
        log_initial = 0.0
        if not isinstance(initial, Schedule):
            initial = check_positive(self, "initial", check_number(self, "initial", initial))
            log_initial = math.log(initial)
        self.initial = initial
        self.steps = check_count(self, "steps", steps)
        self.max_change = check_positive(
            self, "max_change", check_number(self, "max_change", max_change)
        )
        self.change = check_choice(self, "change", change, CHANGES)
        self.log_initial = nn.Parameter(torch.tensor(log_initial))

    @property
    def hand_made(self) -> Schedule | None:
        """The schedule that it starts from, if there is one."""
        return self.initial if isinstance(self.initial, Schedule) else None

    def _init_start(self, like: Tensor) -> dict[str, Any]:
        """Return {"start": the state of the hand-made schedule}, or {} if there is none."""
        return {} if self.hand_made is None else {"start": self.hand_made.init(like)}

    def _start(self, state: Any, **seen: Any) -> tuple[Value, dict[str, Any]]:
        """Return (start_t, {"start": the next state}), as `forward` of the schedule does."""
        if self.hand_made is None:
            return 1.0, {}
        value, after = advance(self.hand_made, state["start"], **seen)
        return value, {"start": after}

    def _start_at(self, state: Any, **seen: Any) -> Value:
        """Return start_t for somebody who only looks."""
        return 1.0 if self.hand_made is None else self.hand_made.value_at(state["start"], **seen)

    def _value(self, start: Value, change: Tensor) -> Tensor:
        return self.log_initial.exp() * start * factor(change, self.change)
