"""Adding updates to parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import DisableTorchFunction, Tensor, nn

from metaopt import tree
from metaopt.optimizer.state import Leaves
from metaopt.tree import Tree


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return w + u leaf by leaf, in the dtype of w; w where u is None.

    Raises:
        ValueError: an update has another shape than its parameter.
    """
    with DisableTorchFunction():  # under a mode every look at a shape is a call of its own
        return tree.map(apply_update, params, updates)


def apply_update(param: Tensor, update: Tensor | None) -> Tensor:
    """Return w + u for one tensor; see `apply_updates`."""
    if update is None:
        return param
    return fit(param, param + update if param.shape == update.shape else update)


def fit(param: Tensor, after: Tensor) -> Tensor:
    """Return what a parameter became, in its dtype.

    Raises:
        ValueError: it has another shape.
    """
    if param.shape != after.shape:
        raise ValueError(
            f"An update must have the shape of its parameter, {tuple(param.shape)}, got "
            f"{tuple(after.shape)}. A tensor hyperparameter must be a scalar or have the shape of "
            "every parameter; for different parameters use `Grouped`."
        )
    return after if after.dtype == param.dtype else after.to(param.dtype)


def check_gradients(gradients: Sequence[Any], weights: Leaves, grads: Tree) -> None:
    """Raise ValueError if a gradient would be broadcast to its parameter.

    Args:
        gradients: one for each weight, or None.
        weights: the parameters.
        grads: the gradients' tree, for its names.
    """
    with DisableTorchFunction():  # under a mode every look at a shape is a call of its own
        for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            if gradient is not None and gradient.shape != weight.shape:
                raise ValueError(
                    f"`grads` must have the shapes of `params`, got {tuple(gradient.shape)} for "
                    f"{tuple(weight.shape)} at {tree.named_leaves(grads)[place][0]}."
                )


def require_params(owner: nn.Module, params: Leaves | None, reason: str) -> Leaves:
    """Return the parameters.

    Raises:
        ValueError: they were not given.
    """
    if params is None:
        raise ValueError(
            f"`{type(owner).__name__}` needs `params` because {reason}. Call `optimizer(grads, "
            "state, params)`."
        )
    return params


def move(weights: Leaves, scale: float | Tensor, directions: Leaves) -> Leaves:
    """Return w + scale d, in the dtypes of w."""
    with DisableTorchFunction():
        pairs = zip(weights, tree.scaled_sums(weights, scale, directions), strict=True)
        return [
            new if new.shape == w.shape and new.dtype == w.dtype else fit(w, new)
            for w, new in pairs
        ]
