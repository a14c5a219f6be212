"""The two kinds of weight decay."""

from __future__ import annotations

from metaopt.optimizer import Leaves, Optimizer
from metaopt.optimizer.hyperparameter import Value, is_zero
from metaopt.tree import scaled_sums


def penalized(owner: Optimizer, grads: Leaves, params: Leaves | None, decay: Value) -> Leaves:
    """Return g + decay w, the gradient of the loss plus decay/2 |w|^2.

    Raises:
        ValueError: there is decay, but no `params`.
    """
    if is_zero(decay):
        return grads
    weights = owner._require_params(params, f"weight_decay={decay}")
    return scaled_sums(grads, decay, weights)


def decayed(
    owner: Optimizer, updates: Leaves, params: Leaves | None, lr: Value, decay: Value
) -> Leaves:
    """Return u - lr decay w: decoupled from the gradient, so not divided by its size.

    Raises:
        ValueError: there is decay, but no `params`.
    """
    if is_zero(decay):
        return updates
    weights = owner._require_params(params, f"weight_decay={decay}")
    return scaled_sums(updates, -lr * decay, weights)
