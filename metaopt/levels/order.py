"""The order in which batches come out of an iterable, and how it is found again."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

from metaopt.random_state import kept_random_state, read_random_state, restore_random_state


@runtime_checkable
class NumberedBatches(Protocol):
    """Data whose batch is a function of its number: every place of it is found at once."""

    def batch_at(self, number: int) -> Any:
        """Return batch `number`, from 0 without an end."""
        ...


class Start(TypedDict):
    """Where an iterable began, and the random numbers with which it did.

    Attributes:
        number: of the first batch that came out.
        random: state of the generators that all have in common; from torch's a shuffled
            `DataLoader` draws its order.
        own: states of the generators that the iterable has of its own.
    """

    number: int
    random: dict[str, Any]
    own: list[Tensor]


class Order(TypedDict):
    """A place in the order of an iterable.

    Attributes:
        position: number of the next batch.
        starts: where the iterable began, of the passes through it that are not over.
        own: as in `Start`, now.
    """

    position: int
    starts: list[Start]
    own: list[Tensor]


class Batches:
    """The batches of an iterable, one after the other, from the beginning again when it ends.

    Attributes:
        number: of the next batch that comes out.

    Args:
        source: the iterable, or numbered batches.
    """

    def __init__(self, source: Iterable[Any]):
        self.source, self.number = source, 0
        self.is_iterator = isinstance(source, Iterator)
        self._is_numbered = isinstance(source, NumberedBatches)
        self._pass: Iterator[Any] | None = None
        self._read = 0  # batches in this pass
        self._starts: list[Start] = []
        self._generators = _find_generators(source)

    def next(self) -> Any:
        """Return the next batch.

        Raises:
            StopIteration: the iterable is empty, or an iterator that has ended.
        """
        if self._is_numbered:
            batch = self.source.batch_at(self.number)  # type: ignore[attr-defined]
        elif type(self.source) in (list, tuple):
            batch = _get_row(self.source, self.number)  # type: ignore[arg-type]
        else:
            batch = self._read_pass()
        self.number += 1
        return batch

    def place(self, position: int) -> Order:
        """Return where a reader is that has taken `position` batches."""
        self._forget(position)
        return {"position": position, "starts": [*self._starts], "own": self._own()}

    def check(self, place: Any) -> None:
        """Raise TypeError, LookupError, ValueError or RuntimeError unless it can be a place."""
        with kept_random_state():
            for start in place["starts"]:
                restore_random_state(start["random"])
        numbers = [place["position"], *[start["number"] for start in place["starts"]]]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError(f"the numbers of batches are {numbers}")
        for states in [place["own"], *[start["own"] for start in place["starts"]]]:
            for generator, state in zip(self._generators, states, strict=True):
                torch.Generator(generator.device).set_state(state)

    def wind(self, place: Order) -> None:
        """Go to a place; an iterator can only go on, and is left where it is if it is past it.

        The generators are afterwards as they were at that place, common ones as they are now.
        """
        position = place["position"]
        if self.is_iterator and position < self.number:
            return
        if not self.is_iterator:
            self._pass, self._starts = None, [*place["starts"]]
            self.number = self._starts[0]["number"] if self._starts else position
        with kept_random_state():
            self._skip_to(position)
        for generator, state in zip(self._generators, place["own"], strict=True):
            generator.set_state(state)

    def _skip_to(self, position: int) -> None:
        before = None
        while self.number < position:
            self.next()
            now = torch.get_rng_state() if self.is_iterator else None
            if before is not None and not torch.equal(before, now):  # type: ignore[arg-type]
                warnings.warn(
                    "An iterator draws its batches from torch's own generator, so that those after "
                    f"batch {position} are not the ones that would have come. Give it a "
                    "`torch.Generator`, or pass a DataLoader.",
                    stacklevel=2,
                )
                before = None
            else:
                before = now

    def _read_pass(self) -> Any:
        if self._pass is None:
            self._pass = self._begin()
        batch = next(self._pass, _END)
        if batch is _END:
            if self.is_iterator or self._read == 0:
                raise StopIteration
            self._pass = self._begin()
            return self._read_pass()
        self._read += 1
        return batch

    def _begin(self) -> Iterator[Any]:
        """Begin a pass, with the random numbers of before if it begins where one began before."""
        self._read = 0
        known = [start for start in self._starts if start["number"] == self.number]
        if not known:
            now: Start = {
                "number": self.number,
                "random": read_random_state(),
                "own": self._own(),
            }
            self._starts.append(now)
            return iter(self.source)
        with self._drawing_from(known[0]):
            begun = iter(self.source)
            first = [*itertools.islice(begun, 1)]  # a sampler draws its order at the first batch
        return itertools.chain(first, begun)

    @contextmanager
    def _drawing_from(self, start: Start) -> Iterator[None]:
        with kept_random_state():
            restore_random_state(start["random"])
            for generator, state in zip(self._generators, start["own"], strict=True):
                generator.set_state(state)
            yield

    def _forget(self, position: int) -> None:
        """Forget the passes that are over for a reader at this position."""
        past = [start for start in self._starts if start["number"] <= position]
        self._starts = past[-1:] + self._starts[len(past) :]

    def _own(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators]


_END = object()


def _get_row(rows: Sequence[Any], number: int) -> Any:
    if not rows:
        raise StopIteration
    return rows[number % len(rows)]


def _find_generators(source: Any) -> list[torch.Generator]:
    """Return the generators of an iterable, and of the sampler and the data set of a loader."""
    batched = getattr(source, "batch_sampler", None)
    parts = [source, getattr(source, "sampler", None), batched, getattr(source, "dataset", None)]
    owners = [*parts, getattr(batched, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    unique = {id(one): one for one in found if isinstance(one, torch.Generator)}
    return [*unique.values()]
