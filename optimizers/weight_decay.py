"""The two kinds of weight decay."""

from __future__ import annotations

from metaopt.optimizer import Leaves, Optimizer, Value, is_zero, require_params
from metaopt.tree import scaled_sums


def penalized(owner: Optimizer, grads: Leaves, params: Leaves | None, decay: Value) -> Leaves:
    """Return g + decay w, the gradient of the loss plus decay/2 |w|^2.

    Raises:
        ValueError: there is decay, but no `params`.
    """
    if is_zero(decay):
        return grads
    return scaled_sums(grads, decay, require_params(owner, params, f"weight_decay={decay}"))


def decayed(
    owner: Optimizer, updates: Leaves, params: Leaves | None, lr: Value, decay: Value
) -> Leaves:
    """Return u - lr decay w: decoupled from the gradient, so not divided by its size.

    Raises:
        ValueError: there is decay, but no `params`.
    """
    if is_zero(decay):
        return updates
    weights = require_params(owner, params, f"weight_decay={decay}")
    return scaled_sums(updates, -lr * decay, weights)
