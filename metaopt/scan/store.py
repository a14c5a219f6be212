"""Where the states of a loop lie between the way forward and the way back: time -> carry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from metaopt import tree
from metaopt.tree import Tree


class Store(Protocol):
    """Some states of a loop: the carry before the step of each of some times.

    The initial state is not among them: whoever has the loop has it. There are three stores, which
    differ in where states lie: `DeviceStates` and `CpuStates` here, and `Disk`.
    """

    def put(self, time: int, state: Tree) -> None:
        """Hold a state."""
        ...

    def get(self, time: int) -> Tree:
        """Return a state that is held, on the devices where steps run."""
        ...

    def drop(self, time: int) -> None:
        """Let a state go, if it is held."""
        ...

    def times(self) -> list[int]:
        """Return the times of the states that are held, in order."""
        ...


class DeviceStates:
    """States that stay where they are.

    Args:
        states: time -> state, in the order of time; those that are held at the start.
    """

    def __init__(self, states: Mapping[int, Tree]):
        self.states = dict(states)

    def put(self, time: int, state: Tree) -> None:
        """Hold a state."""
        self.states[time] = state

    def get(self, time: int) -> Tree:
        """Return a state that is held."""
        return self.states[time]

    def drop(self, time: int) -> None:
        """Let a state go, if it is held."""
        self.states.pop(time, None)

    def times(self) -> list[int]:
        """Return the times of the states that are held."""
        return list(self.states)


class CpuStates(DeviceStates):
    """States in main memory.

    Args:
        states: time -> state, in the order of time; those that are held at the start.
        first: the initial state, which lies where steps run.
    """

    def __init__(self, states: Mapping[int, Tree], first: Tree):
        super().__init__(states)
        self._first = first

    def put(self, time: int, state: Tree) -> None:
        """Move a state to main memory."""
        self.states[time] = tree.map(lambda leaf: leaf.cpu(), state)

    def get(self, time: int) -> Tree:
        """Return a state on the devices where steps run."""
        return tree.map(lambda leaf, own: leaf.to(own.device), self.states[time], self._first)
