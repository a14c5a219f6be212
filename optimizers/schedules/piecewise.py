"""A schedule of constant pieces."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt.optimizer import Schedule, Value, set_value

from .rows import check_boundaries, check_row, find_in_turn


class Piecewise(Schedule):
    """value_t = values[i] for boundaries[i - 1] <= t < boundaries[i].

    Equal to `torch.optim.lr_scheduler.MultiStepLR` with values lr, lr gamma, lr gamma^2, ...; here
    each can be learned, as a parameter of its own or as an entry of one.

    Args:
        values: one more than boundaries; a tensor or parameter with one axis, or a tuple.
        boundaries: the first step of the second piece, of the third, ...

    Raises:
        ValueError: the boundaries are not increasing positive integers, or the numbers do not fit.
        TypeError: the values are something else.
    """

    vector: Tensor

    def __init__(self, values: tuple[Value, ...] | Tensor, boundaries: tuple[int, ...]):
        super().__init__()
        values = check_row(self, "values", values)
        self.boundaries = check_boundaries(self, "values", values, boundaries)
        if isinstance(values, Tensor):
            set_value(self, "vector", values)
        else:
            for i, value in enumerate(values):
                set_value(self, f"value{i}", value)

    @property
    def values(self) -> tuple[Value, ...] | Tensor:
        """The value of each piece, as they were given."""
        if hasattr(self, "vector"):
            return self.vector
        return tuple(getattr(self, f"value{i}") for i in range(len(self.boundaries) + 1))

    def forward(
        self, state: Any, *, step: Tensor, grads: list[Tensor], **_: Any
    ) -> tuple[Value, Any]:
        return find_in_turn(self.values, self.boundaries, step, grads[0]), state
