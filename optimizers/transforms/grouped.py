"""One optimizer per group of parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from torch import nn

from metaopt.optimizer import Optimizer, State
from metaopt.optimizer.names import choose
from metaopt.optimizer.state import refuse_state

from .by_pattern import ByPattern, Member
from .transform import check_optimizer

Groups = Mapping[str, Optimizer] | Sequence[tuple[str, Optimizer]]
MEMORY = ("slots", "shared")  # whose names are led by the pattern
# what a state holds by the pattern; the state of another optimizer where a member has one
BY_GROUP = ("schedules", "steps", "optimizer")


class Grouped(ByPattern):
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
                'Write Grouped({"*.bias": SGD(0.1), "*": Adam(1e-3)}).'
            )
        if not pairs:
            raise ValueError(
                'Grouped: `groups` must not be empty. Write `Grouped({"*": Adam(1e-3)})`.'
            )
        self.patterns = tuple(pattern for pattern, _ in pairs)
        self._optimizers = nn.ModuleList(check_optimizer(self, optimizer) for _, optimizer in pairs)

    @property
    def groups(self) -> tuple[tuple[str, Optimizer], ...]:
        """The pairs (pattern, optimizer)."""
        return tuple(zip(self.patterns, cast(Iterable[Optimizer], self._optimizers), strict=True))

    def _members(self) -> list[Member]:
        return [Member(f"{pattern}/", optimizer) for pattern, optimizer in self.groups]

    def _choose(self, names: Iterable[str]) -> list[list[str]]:
        return choose(self, "groups", self.patterns, names, rest=False)

    def _merge(self, states: list[State]) -> State:
        merged: State = {"step": states[0]["step"]}
        for kind in MEMORY:
            merged[kind] = {
                f"{pattern}/{name}": memory
                for pattern, state in zip(self.patterns, states, strict=True)
                for name, memory in state[kind].items()
            }
        for kind in BY_GROUP:
            rows = zip(self.patterns, states, strict=True)
            own = {pattern: state[kind] for pattern, state in rows if kind in state}
            merged |= {kind: own} if own else {}
        return merged

    def _split(self, state: State) -> list[State]:
        own: dict[str, State] = {p: {"step": state["step"]} for p in self.patterns}
        strangers = []
        for kind in MEMORY:
            for before in own.values():
                before[kind] = {}
            for name, memory in state[kind].items():
                # the longest, since one pattern may begin as another does
                leading = [p for p in self.patterns if name.startswith(f"{p}/")]
                if leading:
                    pattern = max(leading, key=len)
                    own[pattern][kind][name.removeprefix(f"{pattern}/")] = memory
                else:
                    strangers.append(name)
        if strangers or state["schedules"].keys() != own.keys():
            found = f"the groups {list(state['schedules'])} and memory of none {strangers}"
            refuse_state(self, f", with the groups {list(self.patterns)}", found)
        for pattern, before in own.items():
            before |= {k: state[k][pattern] for k in BY_GROUP if pattern in state.get(k, ())}
        return list(own.values())


def _is_pair(pair: object) -> bool:
    return isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
