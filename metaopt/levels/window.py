"""What happened to levels that several others wait for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from metaopt.levels.order import Event
from metaopt.tree import Tree


class Happened(NamedTuple):
    """An event, and what running it again takes: what was seen, the rows, the state afterwards;
    whether it began at its start.
    """

    event: Event
    scene: Tree
    rows: Tree
    after: Tree
    begins: bool


@dataclass(frozen=True)
class Window:
    """What happened to the levels that a level shares with others since its last step.

    Attributes:
        start: level -> its state then.
        happened: in order.
        inner: level -> the window that it had then, of those that themselves share levels.
    """

    start: Tree
    happened: tuple[Happened, ...] = ()
    inner: Mapping[str, Window] = field(default_factory=dict)

    def then(self, happened: Happened) -> Window:
        """Return the window with one more event."""
        return Window(self.start, (*self.happened, happened), self.inner)

    @property
    def tensors(self) -> Tree:
        """All tensors in it, as a tree."""
        inner = {name: window.tensors for name, window in self.inner.items()}
        return self.start, [(one.scene, one.rows, one.after) for one in self.happened], inner

    def with_tensors(self, tensors: Tree) -> Window:
        """Return the window with other tensors."""
        if not self.start:
            return self
        start, happened, inner = tensors
        pairs = zip(self.happened, happened, strict=True)
        return Window(
            start,
            tuple(
                old._replace(scene=scene, rows=rows, after=after)
                for old, (scene, rows, after) in pairs
            ),
            {name: window.with_tensors(inner[name]) for name, window in self.inner.items()},
        )


NO_WINDOW = Window({})


def opened(
    names: Iterable[str], shared: Mapping[str, frozenset[str]], states: Mapping[str, Tree]
) -> dict[str, Window]:
    """Return level -> window of those that share levels, before anything has happened.

    Args:
        names: upper levels before lower ones.
        shared: level -> the levels that it shares.
        states: level -> state.
    """
    windows: dict[str, Window] = {}
    for name in reversed([*names]):
        if shared[name]:
            windows[name] = _beginning(name, shared, states, windows)
    return windows


def advanced(
    happened: Happened,
    windows: Mapping[str, Window],
    shared: Mapping[str, frozenset[str]],
    states: Mapping[str, Tree],
) -> dict[str, Window]:
    """Return the windows when this has happened too: those that wait for the level hold it, and its
    own begins again.
    """
    name = happened.event.level
    found = {
        waiting: window.then(happened) if name in shared[waiting] else window
        for waiting, window in windows.items()
    }
    if name in found:
        found[name] = _beginning(name, shared, states, found)
    return found


def _beginning(
    name: str,
    shared: Mapping[str, frozenset[str]],
    states: Mapping[str, Tree],
    windows: Mapping[str, Window],
) -> Window:
    inner = {other: windows[other] for other in sorted(shared[name]) if other in windows}
    return Window({other: states[other] for other in sorted(shared[name])}, (), inner)
