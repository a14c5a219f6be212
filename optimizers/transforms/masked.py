"""Updating some of the parameters only."""

from __future__ import annotations

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Optimizer, State
from metaopt.optimizer.hyperparameter import Value
from metaopt.optimizer.names import choose, paths
from metaopt.optimizer.per_parameter import require_gradients
from metaopt.tree import Tree

from .transform import checked


class Masked(Optimizer):
    """u = the update of the optimizer for parameters whose names match the mask, else 0.

    `Masked(Adam(1e-3), mask="head.*")`. Names are dict keys, list indices and fields, joined by
    dots; patterns are those of `fnmatch`. The optimizer sees, and has memory for, the matching
    parameters only.

    Args:
        optimizer: what updates the matching parameters.
        mask: a pattern, or several.

    Raises:
        ValueError: (in `init`) a pattern that matches no parameter.
        TypeError: the optimizer is none, or a pattern is no string.
    """

    def __init__(self, optimizer: Optimizer, mask: str | tuple[str, ...]):
        super().__init__()
        patterns = (mask,) if isinstance(mask, str) else mask
        if (
            not isinstance(patterns, tuple | list)
            or not patterns
            or not all(isinstance(p, str) for p in patterns)
        ):
            raise TypeError(
                f"Masked: `mask` must be a pattern or a tuple of them, got {mask!r}. Write "
                f'mask="head.*".'
            )
        self.optimizer, self.mask = (
            checked(self, optimizer),
            mask if isinstance(mask, str) else tuple(mask),
        )

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        return self.optimizer.init(self._part(params), per_parameter=per_parameter)

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        return self.optimizer.separate(state, self._part(params))

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        self._check_state_keys(state)
        structure = tree.flatten(grads)[1]
        named = paths(grads)
        if "steps" not in state and any(grad is None for grad in named.values()):
            require_gradients(grads)
        chosen = self._chosen(named)
        weights = None
        if params is not None:
            given = dict(zip(named, tree.flatten_like(structure, params, "params"), strict=True))
            weights = {name: given[name] for name in chosen}
        updates, state = self.optimizer(
            {name: named[name] for name in chosen}, state, weights, loss=loss
        )
        for name, grad in named.items():
            if name not in updates:
                updates[name] = None if grad is None else torch.zeros_like(grad)
        return tree.unflatten(structure, [updates[name] for name in named]), state

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does;

        names of the inner optimizer are led by "optimizer.".
        """
        own = [None if given is None else self._part(given) for given in (grads, params)]
        behind = self.optimizer.values(state, loss=loss, grads=own[0], params=own[1])
        return {f"optimizer.{name}": value for name, value in behind.items()}

    def _part(self, given: Tree) -> dict[str, Tensor]:
        named = paths(given)
        return {name: named[name] for name in self._chosen(named)}

    def _chosen(self, named: dict[str, Tensor]) -> list[str]:
        """Return the names that match, in the order of the parameters."""
        patterns = (self.mask,) if isinstance(self.mask, str) else tuple(self.mask)
        matching = {
            name for own in choose(self, "mask", patterns, named, rest=True) for name in own
        }
        return [name for name in named if name in matching]
