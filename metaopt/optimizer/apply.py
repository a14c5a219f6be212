"""Adding updates to parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


def apply_updates(params: Tree, updates: Tree) -> Tree:
    """Return w + u leaf by leaf, in the dtype of w; w where u is None.

    Raises:
        ValueError: an update has another shape than its parameter.
    """
    with torch.DisableTorchFunction():  # under a mode every look at a shape is a call of its own
        return tree.map(apply_update, params, updates)


def apply_update(param: Tensor, update: Tensor | None) -> Tensor:
    """Return w + u for one tensor; see `apply_updates`."""
    if update is None:
        return param
    return fitted(param, param + update if param.shape == update.shape else update)


def fitted(param: Tensor, after: Tensor) -> Tensor:
    """Return what a parameter became, in its dtype.

    Raises:
        ValueError: it has another shape.
    """
    if param.shape != after.shape:
        raise ValueError(
            f"An update must have the shape of its parameter, {tuple(param.shape)}, got "
            f"{tuple(after.shape)}. A tensor "
            "hyperparameter must be a scalar or have the shape of every parameter; for different "
            "parameters use `Grouped`."
        )
    return after if after.dtype == param.dtype else after.to(param.dtype)


def check_gradients(gradients: Sequence[Tensor], weights: Sequence[Tensor], grads: Tree) -> None:
    """Raise ValueError if a gradient would be broadcast to its parameter; `grads` is their tree,
    for its names.
    """
    with torch.DisableTorchFunction():  # under a mode every look at a shape is a call of its own
        if [gradient.shape for gradient in gradients] == [weight.shape for weight in weights]:
            return
        for place, (gradient, weight) in enumerate(zip(gradients, weights, strict=True)):
            if gradient.shape != weight.shape:
                raise ValueError(
                    f"`grads` must have the shapes of `params`, got {tuple(gradient.shape)} for "
                    f"{tuple(weight.shape)} at {tree.named_leaves(grads)[place][0]}."
                )
