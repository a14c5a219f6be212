"""Losses from operations that have forward derivatives of their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


# The signatures are torch's: a compiler passes on the arguments as they were written, without the
# defaults.
def _mse_loss(
    input: Tensor,
    target: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
) -> Tensor:
    """Return the mean, the sum or all of (input - target)^2, in float32 at least, as the kernel."""
    is_plain = size_average is None and reduce is None and weight is None
    if not is_plain or reduction not in ("mean", "sum", "none") or input.shape != target.shape:
        return F.mse_loss(input, target, size_average, reduce, reduction, **_given(weight))
    dtype = torch.promote_types(input.dtype, target.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if not input.dtype == target.dtype == wide:
        input, target = input.to(wide), target.to(wide)
    squares = (input - target).square()
    match reduction:
        case "mean":
            squares = squares.mean()
        case "sum":
            squares = squares.sum()
    if dtype == wide or torch.is_autocast_enabled(input.device.type):
        return squares
    return squares.to(dtype)


def _huber_loss(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Any = None
) -> Tensor:
    """Scale the smooth L1 loss, which is the same, and whose gradient has a forward derivative."""
    if weight is None and delta > 0:
        return delta * F.smooth_l1_loss(input, target, reduction=reduction, beta=delta)
    return F.huber_loss(input, target, reduction, delta, **_given(weight))


def _given(weight: Any) -> dict[str, Any]:
    """Name the argument only where there is one: older torch does not know it."""
    return {} if weight is None else {"weight": weight}


LOSSES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.mse_loss: _mse_loss,
    F.huber_loss: _huber_loss,
}
