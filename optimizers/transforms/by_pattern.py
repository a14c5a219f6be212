"""What optimizers that give parameters to others by their names share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Optimizer, State, Value
from metaopt.optimizer.names import paths
from metaopt.optimizer.state import require_state
from metaopt.optimizer.step import find_present
from metaopt.tree import Tree


class Member(NamedTuple):
    """An optimizer that updates some of the parameters.

    Args:
        prefix: leads the names of its values.
        optimizer: sees its own parameters only.
    """

    prefix: str
    optimizer: Optimizer


class ByPattern(Optimizer):
    """Each parameter is updated by the member that it belongs to by its name, or stays.

    A subclass defines `_members`, which names belong to each (`_choose`), and how their states make
    up one (`_split` and `_merge`).
    """

    def _members(self) -> list[Member]:
        raise NotImplementedError

    def _choose(self, names: Iterable[str]) -> list[list[str]]:
        """Return the names of each member's parameters, in the order of the parameters."""
        raise NotImplementedError

    def _split(self, state: State) -> list[State]:
        """Return the state of each member."""
        raise NotImplementedError

    def _merge(self, states: list[State]) -> State:
        """Invert `_split`."""
        raise NotImplementedError

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        pairs = zip(self._members(), self._divide(params), strict=True)
        states = [one.optimizer.init(own, per_parameter=per_parameter) for one, own in pairs]
        return self._merge(states)

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        rows = zip(self._members(), self._split(state), self._divide(params), strict=True)
        return self._merge([one.optimizer.separate(before, own) for one, before, own in rows])

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        require_state(self, state)
        before, named = self._split(state), paths(grads)
        find_present([*named.values()], grads, state)
        if params is not None:
            tree.leaves_like(grads, params, "params")
        updates = {n: None if g is None else torch.zeros_like(g) for n, g in named.items()}
        states = []
        rows = zip(self._members(), before, self._divide(grads), self._divide(params), strict=True)
        for (_, optimizer), own_state, own_grads, own_params in rows:
            own, after = optimizer(own_grads, own_state, own_params, loss=loss)
            updates |= own
            states.append(after)
        return tree.with_leaves(grads, updates.values()), self._merge(states)

    def evaluated(self, state: State, params: Tree) -> Tree:
        """Return what each member says of its own parameters; see `Optimizer.evaluated`."""
        require_state(self, state)
        named = paths(params)
        for (_, optimizer), before, own in zip(
            self._members(), self._split(state), self._divide(params), strict=True
        ):
            named |= optimizer.evaluated(before, own)
        return tree.with_leaves(params, named.values())

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does.

        A member's prefix leads the names of its values.
        """
        require_state(self, state)
        found: dict[str, Value] = {}
        own = self._split(state), self._divide(grads), self._divide(params)
        for (prefix, optimizer), before, g, w in zip(self._members(), *own, strict=True):
            values = optimizer.values(before, loss=loss, grads=g, params=w)
            found |= {f"{prefix}{name}": value for name, value in values.items()}
        return found

    def _divide(self, given: Tree | None) -> list[dict[str, Tensor] | None]:
        """Return name -> tensor for each member; None for each if nothing is given."""
        if given is None:
            return [None] * len(self._members())
        named = paths(given)
        return [{name: named[name] for name in chosen} for chosen in self._choose(named)]
