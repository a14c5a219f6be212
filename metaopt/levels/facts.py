"""What follows from the levels, the edges and the timetable of a graph, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from metaopt import tree
from metaopt.differentiate import Backprop, FirstOrder, Penalty, PointRule, Rule
from metaopt.levels.edge import Edge
from metaopt.levels.joint import JointRule
from metaopt.levels.level import Level
from metaopt.levels.own_loss import OwnLoss, make_loss
from metaopt.levels.reading import Pair
from metaopt.levels.scope import Rows
from metaopt.levels.timetable import Owner
from metaopt.optimizer import Optimizer
from metaopt.transforms import find_overlapping, is_sharded

if TYPE_CHECKING:
    from metaopt.levels.plan import Plan


Links = Mapping[str, Mapping[str, tuple[str, str]]]


class Move(NamedTuple):
    """Some steps of a level in a turn, with what is known of them before they happen.

    Attributes:
        level: its name.
        steps: number of steps.
        begins: whether the level begins anew here, where its edge says so.
        rule: how the owner of the turn differentiates them; None if it does not.
        rows: the levels with data that run in these steps.
        part: which of the level's steps in this turn these are; None if they are all.
    """

    level: str
    steps: int
    begins: bool
    rule: Rule | None
    rows: tuple[str, ...] = ()
    part: slice | None = None

    def take(self, rows: Rows) -> Rows:
        """Return the batches of these steps among those of the turn."""
        mine = {name: rows[name] for name in self.rows}
        return mine if self.part is None else tree.index(mine, self.part)


# What it depends on


def find_buffers_behind(plan: Plan, name: str) -> frozenset[Pair]:
    """Return the (level, buffer) pairs that a loss depends on, also through other buffers."""
    found: set[Pair] = set()
    pending = [*plan.readings[name].buffers]
    while pending:
        level, key = pair = pending.pop()
        if pair not in found and key in plan.readings[level].moves:
            found.add(pair)
            pending += plan.readings[level].moves[key]
    return frozenset(found)


def _find_carried(plan: Plan) -> dict[str, frozenset[str]]:
    behind = frozenset().union(*(find_buffers_behind(plan, name) for name in plan.levels))
    return {
        name: frozenset(key for level, key in behind if level == name)
        for name in {level for level, _ in behind}
    }


def _find_read_outside(plan: Plan, name: str) -> tuple[str, ...]:
    inside = plan.timetable.inside[name] | {name}
    read: set[str] = set()
    for other in inside:
        read |= plan.readings[other].levels | {level for level, _ in plan.links[other].values()}
        read |= {
            edge.upper.name for edge in plan.above[other] if edge.start == "upper" and other != name
        }
    # trees are flattened in this order, which must not change from process to process
    return tuple(sorted(read - inside))


def _is_read_from_outside(plan: Plan, name: str) -> bool:
    inside = plan.timetable.inside[name]
    return any(
        plan.readings[other].levels & inside for other in plan.levels.keys() - inside - {name}
    )


def _is_random(plan: Plan, name: str) -> bool:
    return any(plan.readings[other].is_random for other in plan.timetable.inside[name] | {name})


def _is_adjustable(plan: Plan, name: str) -> bool:
    optimizer = plan.levels[name].optimizer
    return bool([*optimizer.parameters(), *optimizer.buffers()])


def find_links(levels: Mapping[str, Level]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return level -> tensor of its optimizer -> (level, parameter) that learns it."""
    owners = {
        id(param): (level.name, key)
        for level in levels.values()
        for key, param in level.net.params.items()
    }
    return {
        name: {
            key: owners[id(tensor)]
            for key, tensor in level.optimizer.named_parameters()
            if id(tensor) in owners
        }
        for name, level in levels.items()
    }


# How it responds


def _find_rules(plan: Plan) -> dict[tuple[Owner, str], Rule | None]:
    pairs: list[tuple[Owner, str]] = [
        (owner, event.level) for owner, events in plan.timetable.events.items() for event in events
    ]
    pairs += [(name, lower) for name, shared in plan.timetable.shared.items() for lower in shared]
    return {pair: find_rule(plan, *pair) for pair in pairs}


def find_rule(plan: Plan, viewpoint: Owner, name: str) -> Rule | None:
    """Return how `viewpoint` differentiates the response of a level below it."""
    if viewpoint is None:
        return None
    # Edges from elsewhere do not matter here: to this viewpoint the levels at their upper ends are
    # constants.
    between = plan.timetable.below[viewpoint] | {viewpoint}
    edges = [edge for edge in plan.above[name] if edge.upper.name in between]
    found: list[tuple[Any, frozenset[str]]] = []
    for edge in edges:
        rule, uppers = edge.differentiate, frozenset({edge.upper.name})
        same = next((i for i, (other, _) in enumerate(found) if other == rule), None)
        if same is None:
            found.append((rule, uppers))
        else:
            found[same] = (rule, found[same][1] | uppers)
    path = next((edge for edge in edges if not isinstance(edge.differentiate, PointRule)), None)
    if path is not None and len(found) > 1:
        other = next(edge for edge in edges if edge.differentiate != path.differentiate)
        raise ValueError(
            f"{other}: `differentiate` must be that of {path}, {path.differentiate}, got "
            f"{other.differentiate}. Both are on the way from {viewpoint!r} down to {name!r}, "
            f"whose steps are differentiated in one way."
        )
    if len(found) > 1:
        return JointRule(tuple(found))
    return found[0][0] if found else None


def _find_moves(plan: Plan, owner: Owner) -> Iterator[Move]:
    taken = dict.fromkeys(plan.timetable.steps, 0)
    for name, steps in plan.timetable.events[owner]:
        first = taken[name]
        taken[name] += steps
        part = None if steps == plan.timetable.steps[name] else slice(first, taken[name])
        # once for each step of the level above, of which a turn may hold several
        begins = first % next((edge.steps for edge in plan.above[name]), 1) == 0
        inside = [name, *sorted(plan.timetable.inside[name])]
        rows = tuple(other for other in inside if plan.levels[other].batches is not None)
        yield Move(name, steps, begins, plan.rule(owner, name), rows, part)


def _find_held_by_models(plan: Plan) -> frozenset[str]:
    """Return the levels whose parameters can lie in the memory of their models.

    One model cannot hold copies; what is sharded may be laid out anew at each step; and of two
    parameters in the same memory each has a value of its own.
    """
    owners = [(name, leaf) for name, net in plan.nets.items() for leaf in net.params.values()]
    if any(is_sharded(leaf) for _, leaf in owners):
        return frozenset()
    mixed = {owners[place][0] for place in find_overlapping([leaf for _, leaf in owners])}
    return frozenset(
        name for name, level in plan.levels.items() if level.copies is None and name not in mixed
    )


def _find_copies_below(plan: Plan, name: str) -> int | None:
    members = plan.timetable.members.get(name, ())
    return None if plan.levels[name].copies or not members else plan.levels[members[0]].copies


def _find_responding(plan: Plan, name: str) -> frozenset[str]:
    """Return the levels whose response is part of T, without responses inside of responses."""
    return plan.timetable.shared[name].union(plan.timetable.members.get(name, ()))


def _find_response_rules(plan: Plan, name: str) -> list[Rule]:
    """Return their rules, those of a joint one by one."""
    rules: list[Rule] = []
    for other in _find_responding(plan, name):
        rule = plan.rule(name, other)
        if isinstance(rule, JointRule):
            rules += [part for part, _ in rule.parts]
        elif rule is not None:
            rules.append(rule)
    return rules


def _is_responding_at_points(plan: Plan, name: str) -> bool:
    timetable = plan.timetable
    return all(isinstance(rule, PointRule) for rule in _find_response_rules(plan, name)) and all(
        plan.levels[other].copies is None
        and not timetable.members.get(other)
        and not timetable.shared[other]
        for other in _find_responding(plan, name)
    )


def _is_tried(plan: Plan, name: str) -> bool:
    """Return True if nobody looks at the optimizer's state between a level's step and the end.

    The level makes one step below a top level, by a rule that looks at its parameters alone. It
    goes on from where it stood: elsewhere others own what it would move in place.
    """
    timetable = plan.timetable
    owner = timetable.owner[name]
    if owner is None or not (plan.is_top(owner) and plan.responds_at_points(owner)):
        return False
    rule = plan.rule(owner, name)
    return (
        isinstance(rule, PointRule)
        and not rule.needs_memory
        and timetable.steps[name] == 1
        and timetable.total[name] == 1
        and plan.starts[name] is None
        and not timetable.shared[owner]
        and not plan.levels[name].warmup
        and not any(edge.look_ahead for edge in plan.edges)
        and not plan.compile
    )


def is_plain(plan: Plan, name: str) -> bool:
    """Return True if what responds has rules that are the plain graph of the steps taken."""
    return all(
        isinstance(rule, Backprop | FirstOrder) and rule.memory == "full"
        for rule in _find_response_rules(plan, name)
    )


def is_compilable(plan: Plan, name: str) -> bool:
    """Return True if what responds to a top level is pulled back at points, without randomness."""
    return (
        plan.is_top(name)
        and plan.responds_at_points(name)
        and not any(isinstance(rule, Penalty) for rule in _find_response_rules(plan, name))
        and not _find_responding(plan, name) & plan.random
    )


def _is_separately_compiled(plan: Plan, name: str) -> bool:
    """Return True if the loop of a level can be compiled by itself: no `PointRule` is inside it.

    Such a rule is a Function of its own, which a compiled loop cannot have.
    """
    rules = [
        edge.differentiate for other in plan.timetable.inside[name] for edge in plan.above[other]
    ]
    return not any(isinstance(rule, PointRule) for rule in rules)


def _make_virtual_plan(plan: Plan) -> Plan | None:
    others = {
        edge.lower.name: edge.look_ahead
        for edge in plan.edges
        if isinstance(edge.look_ahead, Optimizer)
    }
    if not others:
        return None
    levels = {
        name: level.with_optimizer(others[name]) if name in others else level
        for name, level in plan.levels.items()
    }
    edges = tuple(replace(edge, look_ahead=bool(edge.look_ahead)) for edge in plan.edges)
    return replace(plan, levels=levels, edges=edges, links=find_links(levels))


def _find_above(plan: Plan, name: str) -> list[Edge]:
    return [edge for edge in plan.edges if edge.lower.name == name]


def _find_lowers(plan: Plan, name: str) -> list[Edge]:
    return [edge for edge in plan.edges if edge.upper.name == name]


def _find_start(plan: Plan, name: str) -> Edge | None:
    return next((edge for edge in plan.above[name] if edge.start != "continue"), None)


def _find_loss(plan: Plan, name: str) -> OwnLoss:
    keeps = plan.copies_below[name] is None
    level, reading = plan.levels[name], plan.readings[name]
    return make_loss(
        level, reading, plan.nets, plan.carried, keeps_statistics=keeps, ranks=plan.ranks
    )


def _of_each(find: Callable[[Plan, str], Any]) -> Callable[[Plan], dict[str, Any]]:
    return lambda plan: {name: find(plan, name) for name in plan.levels}


def _where(is_so: Callable[[Plan, str], bool]) -> Callable[[Plan], frozenset[str]]:
    return lambda plan: frozenset(name for name in plan.levels if is_so(plan, name))


# Name of a fact -> what finds it. In this order, since later ones follow from earlier ones.
FACTS: dict[str, Callable[[Plan], Any]] = {
    "nets": _of_each(lambda plan, name: plan.levels[name].net),
    "above": _of_each(_find_above),
    "lowers": _of_each(_find_lowers),
    "rules": _find_rules,
    "reads_outside": _of_each(_find_read_outside),
    "read_from_outside": _where(_is_read_from_outside),
    "random": _where(_is_random),
    "moves": lambda plan: {owner: (*_find_moves(plan, owner),) for owner in plan.timetable.events},
    "starts": _of_each(_find_start),
    "copies_below": _of_each(_find_copies_below),
    "responding_at_points": _where(_is_responding_at_points),
    "tried": _where(_is_tried),
    "held_by_models": _find_held_by_models,
    "separately_compiled": _where(_is_separately_compiled),
    "adjustable": _where(_is_adjustable),
    "carried": _find_carried,
    "losses": _of_each(_find_loss),
    "virtual": _make_virtual_plan,
}
