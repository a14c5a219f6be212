"""What is wrong with a graph, or with a state that it is to go on from, found before it runs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.differentiate import SAMA, FiniteDifference, Penalty, PointRule, Rule
from metaopt.distributed import is_fully_sharded
from metaopt.levels.edge import Edge
from metaopt.levels.facts import find_buffers_behind
from metaopt.levels.joint import JointRule
from metaopt.levels.level import Level
from metaopt.levels.plan import Plan
from metaopt.levels.reading import Pair
from metaopt.tree import Tree


def name_levels(edges: Sequence[Edge]) -> dict[str, Level]:
    """Return the levels at the ends of the edges, by name.

    Raises:
        TypeError: something is no edge.
        ValueError: there are no edges, an edge stands twice, two levels have one name, or one
            parameter belongs to two levels.
    """
    if isinstance(edges, Edge):
        raise TypeError(
            f"LevelGraph: `edges` must be a list of Edge, got one {edges}. Write "
            f"LevelGraph([edge])."
        )
    for edge in edges:
        if not isinstance(edge, Edge):
            raise TypeError(
                f"LevelGraph: `edges` must be a list of Edge, got a {type(edge).__name__} in it."
            )
    if not edges:
        raise ValueError(
            "LevelGraph: `edges` must hold at least one Edge, got none. Every level is at an end "
            "of an edge."
        )
    levels: dict[str, Level] = {}
    ends: set[tuple[str, str]] = set()
    for edge in edges:
        for level in (edge.upper, edge.lower):
            if levels.setdefault(level.name, level) is not level:
                raise ValueError(
                    f"Two levels have the name {level.name!r}. Losses tell levels apart by their "
                    f"names; rename one."
                )
        if (pair := (edge.upper.name, edge.lower.name)) in ends:
            raise ValueError(f"{edge} stands twice. Two levels are connected once.")
        ends.add(pair)
    owners: dict[int, str] = {}
    for level in levels.values():
        for param in level.net.params.values():
            if (other := owners.setdefault(id(param), level.name)) != level.name:
                raise ValueError(
                    f"The levels {other!r} and {level.name!r} share a parameter of shape "
                    f"{tuple(param.shape)}. A parameter belongs "
                    "to one level: give each a module of its own, and read the other's as "
                    "`levels.NAME`."
                )
    return levels


def check_plan(plan: Plan) -> None:
    """Raise if the parts of a plan contradict each other.

    Raises:
        ValueError: and the message names the level or the edge.
    """
    for edge in plan.edges:
        _check_start(plan, edge)
        _check_copies(plan, edge)
        _check_look_ahead(plan, edge)
        _check_link(plan, edge)
        _check_sharded(plan, edge)
    for name in plan.timetable.levels:
        _check_shared(plan, name)
    responding = plan if plan.virtual is None else plan.virtual
    for edge in responding.edges:
        _check_link(responding, edge)
        _check_response(responding, edge)
        _check_buffers(responding, edge)
    for name, level in plan.levels.items():
        if plan.lowers[name] and not level.allow_unused:
            _check_used(responding, name)


def _check_sharded(plan: Plan, edge: Edge) -> None:
    first_order = FiniteDifference | SAMA | Penalty
    for level in (edge.upper, edge.lower):
        if is_fully_sharded(level.model) and not isinstance(edge.differentiate, first_order):
            raise ValueError(
                f"{edge}: the model of {level.name!r} is fully sharded and has first derivatives "
                f"only, got differentiate={edge.differentiate}. Take `SAMA()`, "
                "`FiniteDifference()` or `Penalty()`; or leave `fully_shard` out and make its "
                "parameters `DTensor`s, which have all derivatives."
            )


def _check_start(plan: Plan, edge: Edge) -> None:
    if edge.start == "continue":
        return
    others = [str(other) for other in plan.above[edge.lower.name] if other is not edge]
    if others:
        raise ValueError(
            f"{edge}: start={edge.start!r} needs a lower level with one upper level, but there is "
            f"{', '.join(others)} too. Use "
            'start="continue".'
        )
    shapes = [
        {key: tuple(param.shape) for key, param in level.net.params.items()}
        for level in (edge.upper, edge.lower)
    ]
    if edge.start == "upper" and shapes[0] != shapes[1]:
        raise ValueError(
            f'{edge}: start="upper" needs models with the same parameters, got {shapes[0]} above '
            f"and {shapes[1]} below. For the "
            "lower level use a copy of the upper level's model."
        )


def _check_copies(plan: Plan, edge: Edge) -> None:
    upper, lower = edge.upper, edge.lower
    if plan.timetable.owner[lower.name] == upper.name:
        beside = {plan.levels[name].copies for name in plan.timetable.members[upper.name]}
        if len(beside) > 1 or (upper.copies is not None and lower.copies != upper.copies):
            raise ValueError(
                f"{edge}: all levels inside a step of {upper.name!r} need the same `copies`, got "
                f"{sorted(beside, key=str)}. "
                "A copy of a level has copies of the levels below it."
            )
    elif lower.copies is not None or upper.copies is not None:
        raise ValueError(
            f"{edge}: a level with `copies` needs one upper level whose loss reads it, and reads "
            f"every level below that. Take "
            "`copies` off, or connect the level with one upper level alone."
        )


def _check_look_ahead(plan: Plan, edge: Edge) -> None:
    if not edge.look_ahead:
        return
    upper = edge.upper.name
    same = all(other.look_ahead for other in plan.lowers[upper])
    if (
        not (plan.is_top(upper) and plan.timetable.owner[edge.lower.name] == upper and same)
        or edge.lower.copies
    ):
        raise ValueError(
            f"{edge}: look_ahead={edge.look_ahead} needs an upper level that is at the top, looks "
            f"ahead on each of its edges and "
            "shares none of its lower levels, and a lower level without `copies`. Leave "
            "`look_ahead` out."
        )


def _check_link(plan: Plan, edge: Edge) -> None:
    for name in sorted(plan.timetable.inside[edge.lower.name] | {edge.lower.name}):
        for tensor, (owner, _) in plan.links[name].items():
            if name not in plan.timetable.below[owner]:
                raise ValueError(
                    f"level {name!r}: its optimizer's parameter {tensor!r} belongs to the level "
                    f"{owner!r}, which is not above it. Add Edge(upper={owner}, lower={name})."
                )
    links = plan.links[edge.lower.name].values()
    if isinstance(edge.differentiate, PointRule) and any(
        owner == edge.upper.name for owner, _ in links
    ):
        raise ValueError(
            f"{edge}: {edge.upper.name!r} is the optimizer of {edge.lower.name!r}, which "
            f"{type(edge.differentiate).__name__} does "
            "not differentiate: where steps end does not tell how they were made. Use "
            "`mo.Backprop()`."
        )


def _check_shared(plan: Plan, name: str) -> None:
    timetable = plan.timetable
    for other in sorted(timetable.shared[name]):
        rule = plan.rule(name, other)
        between = sorted(
            lower for lower in timetable.shared[name] if other in timetable.shared[lower]
        )
        if (
            between
            and isinstance(rule, PointRule)
            and plan.readings[name].levels & ({other} | timetable.inside[other])
        ):
            raise ValueError(
                f"level {name!r}: its loss reads {other!r}, which {between[0]!r} waits for and "
                f"shares with others. How {other!r} responds to where {between[0]!r} came to is "
                f"not known to {_name(rule)}. Read {between[0]!r} "
                "instead, or use `mo.Backprop()`."
            )
    for other in timetable.members.get(name, ()):
        plan.rule(name, other)
    for other in sorted(plan.readings[name].levels & timetable.below[name]):
        _check_deep(plan, name, other)


def _check_deep(plan: Plan, reader: str, name: str) -> None:
    """Check that a level deep below responds to the end point of the level around it."""
    timetable, outside = plan.timetable, (None, reader, plan.timetable.owner[reader])
    owners: list[str] = []
    here = timetable.owner[name]
    while here is not None and here not in outside:
        owners.append(here)
        here = timetable.owner[here]
    for lower, upper in itertools.pairwise(owners):
        home = timetable.owner[upper]
        rule = plan.rule(upper, lower)
        around = plan.rule(reader if home in outside else home, upper)
        if isinstance(rule, PointRule) and not isinstance(around, PointRule):
            raise ValueError(
                f"level {reader!r}: its loss reads {name!r}, which runs inside the steps of "
                f"{lower!r}. {_name(rule)} there and {_name(around)} for {upper!r} "
                f"around it would leave out the response of {name!r}. Read {lower!r} "
                "instead, or differentiate both in the same way."
            )


def _name(rule: Rule | None) -> str:
    return type(rule.parts[0][0] if isinstance(rule, JointRule) else rule).__name__


def _check_response(plan: Plan, edge: Edge) -> None:
    upper, lower = edge.upper.name, edge.lower.name
    if any(
        level == upper
        for name in plan.timetable.below[lower] | {lower}
        for level, _ in _find_dependencies(plan, name)
    ):
        return
    raise ValueError(
        f"{edge}: the loss of {lower!r} does not depend on {upper!r}, so there is no response. "
        f"Read `levels.{upper}` in it, or "
        "take the edge out."
    )


def _check_buffers(plan: Plan, edge: Edge) -> None:
    """Check that no loss depends on buffers whose derivative the edge's rule leaves out."""
    if not isinstance(edge.differentiate, PointRule):
        return
    lower, below = edge.lower.name, plan.timetable.below
    for reader in plan.timetable.levels:
        if lower in below[reader] and edge.upper.name not in below[reader] | {reader}:
            continue  # another way leads down from this one
        for level, key in sorted(find_buffers_behind(plan, reader)):
            if level == lower:
                raise ValueError(
                    f"{edge}: the loss of {reader!r} depends on the buffer {key!r} of {lower!r}, "
                    f"and that on the steps which {lower!r} made. "
                    f"{type(edge.differentiate).__name__} looks at where they ended, and would "
                    f"leave its derivative out. Use `mo.Backprop()`; or, if a constant is meant, "
                    f"detach it where it is read: `levels.{lower}.buffers[{key!r}].detach()`."
                )


def _check_used(plan: Plan, name: str) -> None:
    """Check that every parameter matters to the level's own loss, directly or by responses."""
    below = plan.timetable.below[name]
    matters, pending = {name}, [name]
    while pending:
        one = pending.pop()
        found = {level for level, _ in _find_dependencies(plan, one)} & below - matters
        matters |= found
        pending += found
    used = {key for one in matters for level, key in _find_dependencies(plan, one) if level == name}
    for key in plan.levels[name].net.params:
        if key not in used:
            edge = plan.lowers[name][0]
            raise ValueError(
                f"{edge}: the loss of {name!r} does not depend on its parameter {key!r}, neither "
                f"directly nor through responses. "
                "If that is meant, pass `allow_unused=True` to the level."
            )


def _find_dependencies(plan: Plan, name: str) -> frozenset[Pair]:
    """Return the (level, parameter) pairs that the loss, optimizer or start of `name` depends on.

    What the buffers that it reads of itself and of levels below depend on is among them; those of a
    level above are constants in this one's step.
    """
    found = plan.readings[name].params | frozenset(plan.links[name].values())
    for level, key in find_buffers_behind(plan, name):
        if level == name or level in plan.timetable.below[name]:
            found |= {
                (other, param)
                for other, param in plan.readings[level].moves[key]
                if param in plan.levels[other].net.params
            }
    # a point does not tell where the steps that led there began
    for edge in plan.above[name]:
        if edge.start == "upper" and not isinstance(edge.differentiate, PointRule):
            found |= {(edge.upper.name, key) for key in edge.upper.net.params}
    return found


def check_state(given: Any, own: dict[str, Any]) -> None:
    """Raise unless a state has the parts, names, shapes and dtypes of the graph's own.

    Raises:
        ValueError: the message names the first part that differs.
    """
    if not isinstance(given, dict) or given.keys() != own.keys():
        found = sorted(given) if isinstance(given, dict) else f"a {type(given).__name__}"
        raise ValueError(
            f"LevelGraph: a state must have the parts {sorted(own)}, got {found}. Take one from "
            f"`graph.state_dict()`."
        )
    for part in ("levels", "initial", "draws", "steps", "data"):
        if part == "data" and _have_keys(given[part], own[part]):
            continue  # what is in it, the data checks itself
        # a look at paths takes longer than a step of a small graph
        if _are_alike(given[part], own[part]):
            continue
        one, other = _find_kinds(given[part]), _find_kinds(own[part])
        for path in [*other, *one]:
            if one.get(path) != other.get(path):
                raise ValueError(
                    f"LevelGraph: the state is that of another graph. At {part}{path} it has "
                    f"{one.get(path, 'nothing')}, where this graph has "
                    f"{other.get(path, 'nothing')}. Build the graph with the levels, models and "
                    "optimizers that it was saved with."
                )


def _have_keys(one: Any, other: dict[str, Any]) -> bool:
    return isinstance(one, dict) and one.keys() == other.keys()


def _are_alike(one: Tree, other: Tree) -> bool:
    """Return True if two trees of dicts have the same keys and kinds of leaves, in one order."""
    if one is other:
        return True
    if type(one) is dict:
        return (
            type(other) is dict
            and [*one] == [*other]
            and all(_are_alike(one[key], other[key]) for key in one)
        )
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype
    return type(one) is type(other) is int


def _find_kinds(values: Tree) -> dict[str, str]:
    return {path: _describe(leaf) for path, leaf in tree.named_leaves(values)}


def _describe(leaf: Any) -> str:
    return (
        f"a {leaf.dtype} of shape {tuple(leaf.shape)}"
        if isinstance(leaf, Tensor)
        else f"a {type(leaf).__name__}"
    )
