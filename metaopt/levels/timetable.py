"""When which level steps: read off the edges and off what each loss reads."""

from __future__ import annotations

import graphlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from metaopt.levels.edge import Edge

Owner = str | None  # a level, or None for the graph itself


class Event(NamedTuple):
    """A level makes `steps` steps in a row."""

    level: str
    steps: int


@dataclass(frozen=True)
class Timetable:
    """The order of execution.

    A level that a single level above it waits for runs inside that one's steps: the upper level
    owns it. A level that several wait for belongs to whoever owns these. So does one that nobody
    waits for: its upper level's loss does not read it, so it follows. What belongs to nobody
    belongs to the graph; the top levels do.

    A turn of an owner is what happens between two of its steps: of a level, what one step of it
    takes; of the graph, one round of the top levels.

    Attributes:
        levels: names, upper levels before lower ones.
        below: level -> all levels below it.
        owner: level -> its owner.
        members: owner -> its levels, upper levels before lower ones.
        steps: level -> number of its steps in one turn of its owner.
        events: owner -> what happens in one turn, in order.
        shared: level -> the levels below it that its loss waits for and that it does not own, and
            those that these wait for.
        inside: level -> the levels that run inside its steps.
        total: level -> number of its steps in one step of the graph.
    """

    levels: tuple[str, ...]
    below: Mapping[str, frozenset[str]]
    owner: Mapping[str, Owner]
    members: Mapping[Owner, tuple[str, ...]]
    steps: Mapping[str, int]
    events: Mapping[Owner, tuple[Event, ...]]
    shared: Mapping[str, frozenset[str]]
    inside: Mapping[str, frozenset[str]]
    total: Mapping[str, int]


def arrange(edges: Sequence[Edge], reads: Mapping[str, frozenset[str]]) -> Timetable:
    """Return the order of execution of the levels that the edges connect.

    Args:
        edges: at least one.
        reads: level -> the levels that its loss reads.

    Raises:
        ValueError: the edges make a circle, a loss reads a level neither above nor below its own,
            or the numbers of steps contradict each other.
    """
    levels = _sort(edges)
    below = _find_below(edges, levels)
    for name in levels:
        for other in sorted(reads[name]):
            if other not in below[name] and name not in below[other]:
                raise ValueError(
                    f"level {name!r}: its loss reads {other!r}, which is neither above nor below "
                    f"it, so that no derivative would flow. Add Edge(upper={other}, lower={name}), "
                    f"or the other way round."
                )

    # The upper level of such an edge reads, directly or by way of levels in between, where the
    # lower one ended: so the lower one moves first. Otherwise it follows.
    def is_awaited(edge: Edge) -> bool:
        lower = edge.lower.name
        return bool(reads[edge.upper.name] & (below[lower] | {lower}))

    owner = _find_owners(edges, levels, is_awaited)
    members: dict[Owner, tuple[str, ...]] = {
        who: tuple(name for name in levels if owner[name] == who)
        for who in (None, *levels)
        if who in owner.values()
    }
    steps: dict[str, int] = {}
    events: dict[Owner, tuple[Event, ...]] = {}
    for who, names in members.items():
        inner = [edge for edge in edges if edge.lower.name in names]
        rates = _find_rates(who, names, inner)
        steps |= rates
        events[who] = _find_events(
            names, rates, [(edge, is_awaited(edge)) for edge in inner if edge.upper.name in names]
        )
    shared: dict[str, frozenset[str]] = {}
    for name in reversed(levels):
        beside = [other for other in members[owner[name]] if other in below[name]]
        awaited = frozenset(other for other in beside if reads[name] & (below[other] | {other}))
        shared[name] = awaited.union(*(shared[other] for other in awaited))

    def inside(name: str) -> frozenset[str]:
        own = members.get(name, ())
        return frozenset(own).union(*map(inside, own))

    def total(name: Owner) -> int:
        return 1 if name is None else steps[name] * total(owner[name])

    insides = {name: inside(name) for name in levels}
    totals = {name: total(name) for name in levels}
    return Timetable(levels, below, owner, members, steps, events, shared, insides, totals)


def _sort(edges: Sequence[Edge]) -> tuple[str, ...]:
    uppers: dict[str, list[str]] = {}
    for edge in edges:
        uppers.setdefault(edge.upper.name, [])
        uppers.setdefault(edge.lower.name, []).append(edge.upper.name)
    try:
        return tuple(graphlib.TopologicalSorter(uppers).static_order())
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        raise ValueError(
            f"The levels must not form a circle, got {circle}. Take one of these edges out."
        ) from None


def _find_below(edges: Sequence[Edge], levels: tuple[str, ...]) -> dict[str, frozenset[str]]:
    below: dict[str, frozenset[str]] = {}
    for name in reversed(levels):
        lowers = [edge.lower.name for edge in edges if edge.upper.name == name]
        below[name] = frozenset(lowers).union(*(below[lower] for lower in lowers))
    return below


def _find_owners(
    edges: Sequence[Edge], levels: tuple[str, ...], is_awaited: Callable[[Edge], bool]
) -> dict[str, Owner]:
    """Return the owner of each level: the innermost with all levels that matter to it inside."""
    owner: dict[str, Owner] = {}

    def path(name: Owner) -> list[Owner]:
        return [None] if name is None else [*path(owner[name]), name]

    for name in levels:
        above = [edge for edge in edges if edge.lower.name == name]
        homes = [
            path(edge.upper.name if is_awaited(edge) else owner[edge.upper.name]) for edge in above
        ]
        together = [same[0] for same in zip(*homes, strict=False) if len(set(same)) == 1]
        owner[name] = together[-1] if homes else None
        for edge in above:
            upper = edge.upper.name
            if upper != owner[name] and owner[upper] != owner[name]:
                others = sorted(other.upper.name for other in above if other is not edge)
                raise ValueError(
                    f"{edge}: {upper!r} makes its steps inside those of {owner[upper]!r}, and so "
                    f"cannot share {name!r} with {others}. Give each a lower level of its own, or "
                    f"connect {name!r} with {owner[upper]!r} alone."
                )
    return owner


def _find_rates(who: Owner, names: tuple[str, ...], edges: Sequence[Edge]) -> dict[str, int]:
    """Return level -> number of steps in a turn, the smallest that agree with all edges."""
    rates: dict[str, Fraction] = {}
    neighbours: dict[str, list[tuple[str, Fraction, Edge]]] = defaultdict(list)
    for edge in edges:
        upper, lower, factor = edge.upper.name, edge.lower.name, Fraction(edge.steps)
        neighbours[upper].append((lower, factor, edge))
        if upper != who:
            neighbours[lower].append((upper, 1 / factor, edge))
    for first in names if who is None else (who,):
        if first in rates:
            continue
        group, pending = {first: Fraction(1)}, [first]
        while pending:
            name = pending.pop()
            for other, factor, edge in neighbours[name]:
                rate = group[name] * factor
                if other not in group:
                    group[other] = rate
                    pending.append(other)
                elif group[other] != rate:
                    raise ValueError(
                        f"{edge}: steps={edge.steps} contradicts the other edges, by which "
                        f"{edge.lower.name!r} makes "
                        f"{group[edge.lower.name] / group[edge.upper.name]} steps for one of "
                        f"{edge.upper.name!r}. Every way "
                        "down to a level must give it the same number of steps."
                    )
        # A level that owns others fixes their rates; of top levels that share one, each makes the
        # smallest number of steps after which all are done at once.
        scale = math.lcm(*(rate.denominator for rate in group.values())) if who is None else 1
        rates |= {name: rate * scale for name, rate in group.items()}
    return {name: int(rates[name]) for name in names}


def _find_events(
    names: tuple[str, ...], rates: Mapping[str, int], edges: Sequence[tuple[Edge, bool]]
) -> tuple[Event, ...]:
    """Return the order of steps: awaited levels come before, followers after the others."""
    made = dict.fromkeys(names, 0)

    def is_ready(name: str) -> bool:
        if made[name] == rates[name]:
            return False
        for edge, waits in edges:
            upper, lower = edge.upper.name, edge.lower.name
            if name == upper and made[lower] < edge.steps * (made[name] + (1 if waits else 0)):
                return False
            if name == lower and made[name] >= edge.steps * (made[upper] + (1 if waits else 0)):
                return False
        return True

    events: list[Event] = []
    while made != rates:
        # the lowest first: then a level that waits finds all that it waits for
        name = next((name for name in reversed(names) if is_ready(name)), None)
        if name is None:
            stuck = sorted(name for name in names if made[name] < rates[name])
            raise ValueError(
                f"The levels {stuck} wait for each other. Let their losses read each other in one "
                f"direction only."
            )
        before = made[name]
        while is_ready(name):
            made[name] += 1
        events.append(Event(name, made[name] - before))
    return tuple(events)
