"""A learned value that stays positive."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.checks import check_number, check_positive
from metaopt.optimizer import Schedule, Value


class Positive(Schedule):
    """value = exp(log_value): a constant whose logarithm is learned.

    An outer step of 0.01 changes it by one percent at any size, and it cannot become
    negative. `SGD(lr=Positive(0.1))`.

    Args:
        value: at the start.

    Raises:
        ValueError: `value` is not positive.
    """

    def __init__(self, value: float):
        super().__init__()
        self.value = check_positive(self, "value", check_number(self, "value", value))
        self.log_value = nn.Parameter(torch.tensor(math.log(value)))

    def forward(self, state: Any, **_: Any) -> tuple[Value, Any]:
        return self.log_value.exp(), state

    def value_at(self, state: Any, **_: Any) -> Tensor:
        return self.log_value.exp()
