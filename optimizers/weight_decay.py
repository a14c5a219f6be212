"""The two kinds of weight decay."""

from __future__ import annotations

from metaopt.optimizer import Leaves, Optimizer, Value, is_zero, require_params
from metaopt.optimizer.text import shorten
from metaopt.tree import scaled_sums


def penalized(owner: Optimizer, grads: Leaves, params: Leaves | None, decay: Value) -> Leaves:
    """Return g + decay w, the gradient of the loss plus decay/2 |w|^2.

    Raises:
        ValueError: there is decay, but no `params`.
    """
    if is_zero(decay):
        return grads
    return scaled_sums(grads, decay, _weights(owner, params, decay))


def decayed(
    owner: Optimizer, updates: Leaves, params: Leaves | None, lr: Value, decay: Value
) -> Leaves:
    """Return u - lr decay w: decoupled from the gradient, so not divided by its size.

    Raises:
        ValueError: there is decay, but no `params`.
    """
    if is_zero(decay):
        return updates
    return scaled_sums(updates, -lr * decay, _weights(owner, params, decay))


def _weights(owner: Optimizer, params: Leaves | None, decay: Value) -> Leaves:
    """Return the parameters; the text is made only if it is needed, since it reads a number."""
    if params is not None:
        return params
    return require_params(owner, None, f"weight_decay={shorten(decay)}")
