"""Updating some of the parameters only."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Observe, Optimizer, State
from metaopt.optimizer.hyperparameter import Value
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

    def init(self, params: Tree) -> State:
        """Return the state before the first step."""
        return self.optimizer.init(self._matching(params))

    def forward(self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        structure = tree.flatten(grads)[1]
        named = paths(grads)
        chosen = self._chosen(named)
        weights = None
        if params is not None:
            given = dict(zip(named, tree.flatten_like(structure, params, "params"), strict=True))
            weights = {name: given[name] for name in chosen}
        updates, state = self.optimizer({name: named[name] for name in chosen}, state, weights, loss=loss)
        return tree.unflatten(structure, [updates[n] if n in updates else torch.zeros_like(g) for n, g in named.items()]), state

    def rate(self, state: State, params: Tree, observe: Observe) -> Value:
        """Return the step size of the inner optimizer, as `Optimizer.rate` does."""

        def observed() -> tuple[Tree, Tensor | None]:
            grads, loss = observe()
            return self._matching(grads), loss

        return self.optimizer.rate(state, self._matching(params), observed)

    def _matching(self, values: Tree) -> dict[str, Tensor]:
        named = paths(values)
        return {name: named[name] for name in self._chosen(named)}

    def _chosen(self, named: dict[str, Tensor]) -> list[str]:
        """Return the names that match, in the order of the parameters."""
        patterns = (self.mask,) if isinstance(self.mask, str) else tuple(self.mask)
        matching = {name for own in choose(self, "mask", patterns, named, rest=True) for name in own}
        return [name for name in named if name in matching]
