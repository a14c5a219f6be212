"""Where a level's batches come from."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.levels.order import Batches, Order
from metaopt.levels.plan import Plan
from metaopt.levels.scope import Rows
from metaopt.levels.timetable import Owner
from metaopt.tree import Tree


class LevelData:
    """The batches of an iterable, in order, from the beginning again when it ends.

    Attributes:
        position: number of batches taken.

    Args:
        level: whose data it is, for messages.
        data: the iterable, or None.
        device: where the batches are moved.

    Raises:
        TypeError: `data` is a batch itself, or no iterable.
    """

    def __init__(self, level: str, data: Iterable[Any] | None, device: torch.device):
        if (
            isinstance(data, Tensor | dict)
            or hasattr(data, "__array__")
            or (isinstance(data, tuple) and any(isinstance(part, Tensor) for part in data))
        ):
            raise TypeError(
                f"level {level!r}: `data` must be an iterable of batches, got a "
                f"{type(data).__name__}, which looks like one batch. "
                "For a batch that is the same at every step write `data=[batch]`."
            )
        if data is not None and not isinstance(data, Iterable):
            raise TypeError(
                f"level {level!r}: `data` must be an iterable of batches or None, got "
                f"{type(data).__name__}."
            )
        self.level, self.device = level, device
        self.position = 0
        self._batches = Batches(() if data is None else data)
        self._ahead: deque[Tree] = deque()
        self._place: Order | None = None  # where to go before the next batch

    def peek(self, count: int) -> list[Tree]:
        """Return the next batches without taking them."""
        self.wind()
        while len(self._ahead) < count:
            self._ahead.append(self._moved(self._next()))
        return list(self._ahead)[:count]

    def take(self, count: int) -> None:
        """Take the next `count` batches, which have been peeked at."""
        for _ in range(count):
            self._ahead.popleft()
        self.position += count

    def place(self) -> Order:
        """Return where the data is, for `seek`."""
        return self._place or self._batches.place(self.position)

    def check(self, place: Any) -> None:
        """Raise ValueError unless it is a place in data of this kind."""
        try:
            self._batches.check(place)
        except (TypeError, LookupError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"level {self.level!r}: the state is not that of its `data`: {error}. Pass the "
                "kind of data that it was saved with."
            ) from error

    def seek(self, place: Order) -> None:
        """Go to a place at the next batch; an iterator that is past it stays where it is."""
        if self._batches.is_iterator and place["position"] <= self.position:
            return
        self._ahead.clear()
        self._place, self.position = place, place["position"]

    def wind(self) -> None:
        """Go where `seek` said."""
        if self._place is not None:
            place, self._place = self._place, None
            try:
                self._batches.wind(place)
            except StopIteration:
                raise self._ended() from None

    def _next(self) -> Tree:
        try:
            return self._batches.next()
        except StopIteration:
            raise self._ended() from None
        except Exception as error:
            error.add_note(f"It comes from `data` of level {self.level!r}: {self._where()}.")
            raise

    def _where(self) -> str:
        return f"batch {self._batches.number}, counted from 0, could not be read"

    def _ended(self) -> ValueError:
        if self._batches.is_iterator:
            return ValueError(
                f"level {self.level!r}: `data` ended after {self._batches.number} batches and "
                "cannot begin again: it is an iterator. "
                "Pass a list or a DataLoader, or a generator that does not end."
            )
        return ValueError(f"level {self.level!r}: `data` is empty.")

    def _moved(self, batch: Tree) -> Tree:
        leaves = tree.leaves(batch)
        if all(isinstance(leaf, Tensor) and leaf.device == self.device for leaf in leaves):
            return batch  # the same object, so that a batch that comes again can be known
        try:
            return tree.map(lambda leaf: torch.as_tensor(leaf).to(self.device), batch)
        except (TypeError, RuntimeError) as error:
            kinds = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
            raise TypeError(
                f"level {self.level!r}: a batch must be a tree of tensors, got leaves of type "
                f"{kinds}."
            ) from error


def _arrange(level: str, batches: list[Tree], shape: tuple[int, ...]) -> Tree:
    """Return batches, in the order of time, as one tree whose leaves have these leading axes.

    Raises:
        ValueError: the batches differ in shape.
    """
    first = batches[0]
    if not shape:
        return first
    if all(batch is first for batch in batches):
        return tree.map(lambda leaf: leaf.expand(*shape, *leaf.shape), first)
    try:
        return tree.map(
            lambda *leaves: torch.stack(leaves).reshape(*shape, *leaves[0].shape), *batches
        )
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"level {level!r}: the {len(batches)} batches of one step of the level above must have "
            f"the same structure and shapes: {error}. With a DataLoader, `drop_last=True`."
        ) from error


def peek_rows(
    plan: Plan, data: Mapping[str, LevelData], owner: Owner
) -> tuple[Rows, dict[str, int]]:
    """Return the next batches of one turn of `owner`, and their numbers, by level."""
    for one in data.values():  # all at once: loaders may have a generator in common
        one.wind()
    rows: Rows = {}
    counts: dict[str, int] = {}
    for name, level in plan.levels.items():
        inside = owner in (None, name) or name in plan.timetable.inside[owner]
        if inside and level.batches is not None:
            axes = plan.leading_axes(name, owner)
            counts[name] = math.prod(axes)
            rows[name] = _arrange(name, data[name].peek(counts[name]), axes)
    return rows, counts
