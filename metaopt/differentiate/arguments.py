"""Whether what a rule was given makes sense."""

from __future__ import annotations

import math
from typing import Literal

Scale = float | Literal["lr"]


def check_scale(rule: object, scale: object) -> None:
    """Raise ValueError unless it is a positive, finite number or "lr"."""
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale != "lr" and not (is_number and 0 < scale < math.inf):  # type: ignore[operator]
        raise ValueError(
            f'{type(rule).__name__}: `scale` must be a positive number or "lr", got {scale!r}.'
        )
