"""A value for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt.optimizer import Schedule, Value, set_value

from ..scalars import scalar_dtype
from .rows import check_row


class PerStep(Schedule):
    """value_t = values[t], and the last one from t = steps - 1 on.

    The values hold beyond their end because the step is a tensor, which must not decide about an
    error. A list of numbers becomes a float64 tensor; to learn the values, give an `nn.Parameter`.

    Args:
        values: [steps], a parameter or tensor, or a list of numbers.

    Raises:
        ValueError: there are none, they have more than one axis, or one is below 0.
        TypeError: they are something else.

    Reference:
        Antoniou, Edwards, Storkey, ICLR 2019, arXiv:1810.09502 (MAML++), section 4, "per-step
        learning rates".
    """

    values: Tensor

    def __init__(self, values: Tensor | Sequence[float]):
        super().__init__()
        values = check_row(self, "values", values)
        if not isinstance(values, Tensor):
            if any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
                raise TypeError(
                    f"PerStep: `values` must be a tensor or a list of numbers, got {values!r}. To "
                    "learn them, write PerStep(nn.Parameter(torch.full((steps,), 0.1))); a few of "
                    "different kinds are `Piecewise`."
                )
            values = torch.tensor(values, dtype=torch.float64)
        set_value(self, "values", values)

    def forward(
        self, state: Any, *, step: Tensor, grads: list[Tensor], **_: Any
    ) -> tuple[Value, Any]:
        values = self.values.to(step.device, scalar_dtype(grads[0]))
        at = step.clamp(max=len(values) - 1)
        # indexing by a tensor would read its value
        return values.gather(0, at.reshape(1))[0], state
