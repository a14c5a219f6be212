"""One optimizer per group of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer import Optimizer, State
from metaopt.tree import Tree
from optimizers.transforms.select import choose, paths
from optimizers.transforms.transform import checked

Groups = Mapping[str, Optimizer] | Sequence[tuple[str, Optimizer]]


class Grouped(Optimizer):
    """Each parameter is updated by the optimizer of the first pattern that its name matches.

    `Grouped({"*.bias": SGD(0.1), "*": Adam(1e-3)})`. Names are dict keys, list indices and fields, joined by dots; patterns are
    those of `fnmatch`. Each optimizer sees its own parameters only (so a `ClipNorm` inside a group clips the group's norm), and
    the same loss. In the state, names of memory are led by the pattern.

    Args:
        groups: pattern -> optimizer, in this order.

    Raises:
        ValueError: no groups; (in `init`) a parameter that matches none, or a pattern that gets no parameter.
        TypeError: something else than an optimizer.
    """

    def __init__(self, groups: Groups):
        super().__init__()
        pairs = list(groups.items()) if isinstance(groups, Mapping) else [(pattern, optimizer) for pattern, optimizer in groups]
        if not pairs:
            raise ValueError('Grouped: `groups` must not be empty. Write `Grouped({"*": Adam(1e-3)})`.')
        self.patterns = tuple(pattern for pattern, _ in pairs)
        self._optimizers = nn.ModuleList(checked(self, optimizer) for _, optimizer in pairs)

    @property
    def groups(self) -> tuple[tuple[str, Optimizer], ...]:
        """The pairs (pattern, optimizer)."""
        return tuple(zip(self.patterns, cast(Iterable[Optimizer], self._optimizers), strict=True))

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        named = paths(params)
        states = [
            optimizer.init({name: named[name] for name in chosen}, per_parameter=per_parameter)
            for (_, optimizer), chosen in zip(self.groups, self._chosen(named), strict=True)
        ]
        return self._merged(states)

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        named = paths(params)
        states = [
            optimizer.separate(self._part(state, pattern), {name: named[name] for name in chosen})
            for (pattern, optimizer), chosen in zip(self.groups, self._chosen(named), strict=True)
        ]
        return self._merged(states)

    def forward(self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        structure = tree.flatten(grads)[1]
        named = paths(grads)
        weights = None if params is None else dict(zip(named, tree.flatten_like(structure, params, "params"), strict=True))
        updates: dict[str, Tensor] = {}
        states = []
        for (pattern, optimizer), chosen in zip(self.groups, self._chosen(named), strict=True):
            own = None if weights is None else {name: weights[name] for name in chosen}
            moved, after = optimizer({name: named[name] for name in chosen}, self._part(state, pattern), own, loss=loss)
            updates |= moved
            states.append(after)
        return tree.unflatten(structure, [updates[name] for name in named]), self._merged(states)

    def _chosen(self, named: dict[str, Tensor]) -> list[list[str]]:
        """Return the names of each group."""
        return choose(self, "groups", self.patterns, named, rest=False)

    def _merged(self, states: list[State]) -> State:
        merged: State = {"step": states[0]["step"], "slots": {}, "shared": {}, "schedules": {}}
        for pattern, state in zip(self.patterns, states, strict=True):
            for kind in ("slots", "shared"):
                merged[kind] |= {f"{pattern}/{name}": memory for name, memory in state[kind].items()}
            merged["schedules"][pattern] = state["schedules"]
        if "steps" in states[0]:
            merged["steps"] = {pattern: state["steps"] for pattern, state in zip(self.patterns, states, strict=True)}
        return merged

    @staticmethod
    def _part(state: State, pattern: str) -> State:
        """Invert `_merged` for one group."""
        lead = f"{pattern}/"
        memory = {
            kind: {name.removeprefix(lead): m for name, m in state[kind].items() if name.startswith(lead)}
            for kind in ("slots", "shared")
        }
        counts = {"steps": state["steps"][pattern]} if "steps" in state else {}
        return {"step": state["step"], **memory, "schedules": state["schedules"][pattern], **counts}
