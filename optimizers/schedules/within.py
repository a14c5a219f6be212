"""A learned value that stays between two numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.checks import check_number
from metaopt.optimizer import Schedule, Value


class Within(Schedule):
    """value = low + (high - low) sigmoid(logit): a constant that cannot leave (low, high).

    For what has a range, such as a decay: `Adam(Positive(1e-3), betas=(Within(0.9),
    Within(0.999)))`. Near an end an outer step changes the distance to it by a factor.

    Args:
        value: at the start.
        low: one end.
        high: the other.

    Raises:
        ValueError: `value` does not lie between them.
    """

    def __init__(self, value: float, low: float = 0.0, high: float = 1.0):
        super().__init__()
        self.value = check_number(self, "value", value)
        self.low, self.high = check_number(self, "low", low), check_number(self, "high", high)
        if not self.low < self.value < self.high:
            raise ValueError(
                f"Within: `value` must lie between low={low} and high={high}, got {value}. Nothing "
                "is learned at an end."
            )
        logit = math.log((value - low) / (high - value))
        self.logit = nn.Parameter(torch.tensor(logit))
        rounded = low + (high - low) * torch.tensor(logit, device="cpu").sigmoid()
        if not low < float(rounded) < high:
            raise ValueError(
                f"Within: `value` must lie between low={low} and high={high} after it is rounded "
                f"to {rounded.dtype}, got {value}. Take one that is further away from the ends."
            )

    def forward(self, state: Any, **_: Any) -> tuple[Value, Any]:
        return self._value(), state

    def value_at(self, state: Any, **_: Any) -> Tensor:
        return self._value()

    def _value(self) -> Tensor:
        return self.low + (self.high - self.low) * self.logit.sigmoid()
