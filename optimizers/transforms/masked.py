"""Updating some of the parameters only."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Optimizer, State
from metaopt.optimizer.per_parameter import require_gradients
from metaopt.tree import Tree
from optimizers.transforms.select import choose, paths
from optimizers.transforms.transform import checked


class Masked(Optimizer):
    """u = the update of the optimizer for parameters whose names match the mask, else 0.

    `Masked(Adam(1e-3), mask="head.*")`. Names are dict keys, list indices and fields, joined by dots; patterns are those of
    `fnmatch`. The optimizer sees, and has memory for, the matching parameters only.

    Args:
        optimizer: what updates the matching parameters.
        mask: a pattern, or several.

    Raises:
        ValueError: (in `init`) a pattern that matches no parameter.
        TypeError: the optimizer is none.
    """

    def __init__(self, optimizer: Optimizer, mask: str | tuple[str, ...]):
        super().__init__()
        self.optimizer, self.mask = checked(self, optimizer), mask

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        named = paths(params)
        return self.optimizer.init({name: named[name] for name in self._chosen(named)}, per_parameter=per_parameter)

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        named = paths(params)
        return self.optimizer.separate(state, {name: named[name] for name in self._chosen(named)})

    def forward(self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        structure = tree.flatten(grads)[1]
        named = paths(grads)
        if "steps" not in state and any(grad is None for grad in named.values()):
            require_gradients(grads)
        chosen = self._chosen(named)
        weights = None
        if params is not None:
            given = dict(zip(named, tree.flatten_like(structure, params, "params"), strict=True))
            weights = {name: given[name] for name in chosen}
        updates, state = self.optimizer({name: named[name] for name in chosen}, state, weights, loss=loss)
        for name, grad in named.items():
            if name not in updates:
                updates[name] = None if grad is None else torch.zeros_like(grad)
        return tree.unflatten(structure, [updates[name] for name in named]), state

    def _chosen(self, named: dict[str, Tensor]) -> list[str]:
        """Return the names that match, in the order of the parameters."""
        patterns = (self.mask,) if isinstance(self.mask, str) else tuple(self.mask)
        matching = {name for own in choose(self, "mask", patterns, named, rest=True) for name in own}
        return [name for name in named if name in matching]
