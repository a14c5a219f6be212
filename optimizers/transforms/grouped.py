"""One optimizer per group of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer import Optimizer, State
from metaopt.optimizer.hyperparameter import Value
from metaopt.optimizer.names import choose, paths
from metaopt.tree import Tree

from .transform import checked

Groups = Mapping[str, Optimizer] | Sequence[tuple[str, Optimizer]]


class Grouped(Optimizer):
    """Each parameter is updated by the optimizer of the first pattern that its name matches.

    `Grouped({"*.bias": SGD(0.1), "*": Adam(1e-3)})`. Names are dict keys, list indices and fields,
    joined by dots; patterns are those of `fnmatch`. Each optimizer sees its own parameters only (so
    a `ClipNorm` inside a group clips the group's norm), and the same loss. In the state, names of
    memory are led by the pattern.

    Args:
        groups: pattern -> optimizer, in this order.

    Raises:
        ValueError: no groups; (in `init`) a parameter that matches none, or a pattern that gets no
            parameter.
        TypeError: something else than an optimizer, or than a string for a pattern.
    """

    def __init__(self, groups: Groups):
        super().__init__()
        pairs = list(groups.items()) if isinstance(groups, Mapping) else groups
        if not isinstance(pairs, tuple | list) or not all(_is_pair(pair) for pair in pairs):
            raise TypeError(
                f"Grouped: `groups` must be a dict from patterns to optimizers, got {groups!r}. "
                f"Write "
                'Grouped({"*.bias": SGD(0.1), "*": Adam(1e-3)}).'
            )
        if not pairs:
            raise ValueError(
                'Grouped: `groups` must not be empty. Write `Grouped({"*": Adam(1e-3)})`.'
            )
        self.patterns = tuple(pattern for pattern, _ in pairs)
        self._longest_first = sorted(self.patterns, key=len, reverse=True)
        self._optimizers = nn.ModuleList(checked(self, optimizer) for _, optimizer in pairs)

    @property
    def groups(self) -> tuple[tuple[str, Optimizer], ...]:
        """The pairs (pattern, optimizer)."""
        return tuple(zip(self.patterns, cast(Iterable[Optimizer], self._optimizers), strict=True))

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        pairs = zip(self.groups, self._parts(params), strict=True)
        return self._merged(
            [optimizer.init(own, per_parameter=per_parameter) for (_, optimizer), own in pairs]
        )

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        pairs = zip(self.groups, self._parts(params), strict=True)
        return self._merged(
            [
                optimizer.separate(self._part(state, pattern), own)
                for (pattern, optimizer), own in pairs
            ]
        )

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        self._check_groups(state)
        structure = tree.flatten(grads)[1]
        named = paths(grads)
        weights = (
            None
            if params is None
            else dict(zip(named, tree.flatten_like(structure, params, "params"), strict=True))
        )
        updates: dict[str, Tensor] = {}
        states = []
        for (pattern, optimizer), chosen in zip(self.groups, self._chosen(named), strict=True):
            own = None if weights is None else {name: weights[name] for name in chosen}
            moved, after = optimizer(
                {name: named[name] for name in chosen}, self._part(state, pattern), own, loss=loss
            )
            updates |= moved
            states.append(after)
        return tree.unflatten(structure, [updates[name] for name in named]), self._merged(states)

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does;

        names in a group are led by its pattern and "/".
        """
        self._check_groups(state)
        own = [
            [None] * len(self.groups) if given is None else self._parts(given)
            for given in (grads, params)
        ]
        found: dict[str, Value] = {}
        for (pattern, optimizer), g, w in zip(self.groups, *own, strict=True):
            values = optimizer.values(self._part(state, pattern), loss=loss, grads=g, params=w)
            found |= {f"{pattern}/{name}": value for name, value in values.items()}
        return found

    def _parts(self, given: Tree) -> list[dict[str, Tensor]]:
        """Return name -> tensor for each group."""
        named = paths(given)
        return [{name: named[name] for name in chosen} for chosen in self._chosen(named)]

    def _chosen(self, named: dict[str, Tensor]) -> list[list[str]]:
        """Return the names of each group."""
        return choose(self, "groups", self.patterns, named, rest=False)

    def _merged(self, states: list[State]) -> State:
        merged: State = {"step": states[0]["step"], "slots": {}, "shared": {}, "schedules": {}}
        for pattern, state in zip(self.patterns, states, strict=True):
            for kind in ("slots", "shared"):
                merged[kind] |= {
                    f"{pattern}/{name}": memory for name, memory in state[kind].items()
                }
            merged["schedules"][pattern] = state["schedules"]
        if "steps" in states[0]:
            merged["steps"] = {
                pattern: state["steps"]
                for pattern, state in zip(self.patterns, states, strict=True)
            }
        return merged

    def _part(self, state: State, pattern: str) -> State:
        """Invert `_merged` for one group."""
        own = {
            kind: {
                name.removeprefix(f"{pattern}/"): m
                for name, m in state[kind].items()
                if self._group_of(name) == pattern
            }
            for kind in ("slots", "shared")
        }
        counts = {"steps": state["steps"][pattern]} if "steps" in state else {}
        return {"step": state["step"], **own, "schedules": state["schedules"][pattern], **counts}

    def _group_of(self, name: str) -> str | None:
        """Return the pattern that leads a name in the state: the longest, since one may begin as
        another does.
        """
        return next(
            (pattern for pattern in self._longest_first if name.startswith(f"{pattern}/")), None
        )

    def _check_groups(self, state: Any) -> None:
        """Raise ValueError if the state is not that of these groups."""
        self._check_state_keys(state)
        strangers = [
            name
            for kind in ("slots", "shared")
            for name in state[kind]
            if self._group_of(name) is None
        ]
        if strangers or state["schedules"].keys() != set(self.patterns):
            raise ValueError(
                f"`state` must be that of this Grouped, with the groups {list(self.patterns)}, got "
                f"the groups {list(state['schedules'])} and memory of none {strangers}. Pass what "
                f"its own "
                "`init`, or the step before, returned."
            )


def _is_pair(pair: object) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
