"""The best state of a training by its validation, and when it has stopped getting better."""

from __future__ import annotations

import copy
import math
from typing import Any


class Selection:
    """Keeps the state with the lowest value, and counts the values since.

    Attributes:
        best: the lowest value so far; infinite before the first that is a number.
        best_step: the step at which it was seen.
        best_state: the state then, None if there is none.
        waited: values since that were not lower by more than `min_change`; a nan is never lower.

    Args:
        patience: number of such values after which it is time to stop; None for never.
        min_change: how much lower a value must be to count.
    """

    def __init__(self, patience: int | None, min_change: float):
        self.patience, self.min_change = patience, min_change
        self.best, self.best_step, self.waited = math.inf, 0, 0
        self.best_state: Any = None
        self._reference = math.inf  # what the next value is compared with, to count

    def take(self, step: int, value: float, state: Any) -> bool:
        """Return True if this is the best value; then a copy of the state is kept."""
        if value < self._reference - self.min_change:
            self._reference, self.waited = value, 0
        else:
            self.waited += 1
        if not value < self.best:  # false for a nan
            return False
        self.best, self.best_step, self.best_state = value, step, copy.deepcopy(state)
        return True

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return the numbers, without the state."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "reference": self._reference,
        }

    def load_state_dict(self, numbers: dict[str, Any], best_state: Any) -> None:
        """Go back to numbers, and to the state they speak of; without it a best is sought anew."""
        self.best, self.best_step = float(numbers["best"]), int(numbers["best_step"])
        self.waited, self._reference = int(numbers["waited"]), float(numbers["reference"])
        self.best_state = best_state
        if best_state is None:
            self.best = math.inf
