"""What happened to levels that several others wait for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from metaopt.levels.order import Event
from metaopt.tree import Tree


class Happened(NamedTuple):
    """An event, and what running it again takes: what was seen, the rows, the state afterwards; whether it began at its start."""

    event: Event
    scene: Tree
    rows: Tree
    after: Tree
    begins: bool


@dataclass(frozen=True)
class Window:
    """What happened to the levels that a level shares with others since its last step, beginning at `start`: level -> state."""

    start: Tree
    happened: tuple[Happened, ...] = ()

    def then(self, happened: Happened) -> Window:
        """Return the window with one more event."""
        return Window(self.start, (*self.happened, happened))

    @property
    def tensors(self) -> Tree:
        """All tensors in it, as a tree."""
        return self.start, [(one.scene, one.rows, one.after) for one in self.happened]

    def with_tensors(self, tensors: Tree) -> Window:
        """Return the window with other tensors."""
        start, happened = tensors
        pairs = zip(self.happened, happened, strict=True)
        return Window(start, tuple(old._replace(scene=scene, rows=rows, after=after) for old, (scene, rows, after) in pairs))


NO_WINDOW = Window({})
