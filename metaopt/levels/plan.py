"""What a graph is, apart from its tensors: every fact about it that a step looks up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metaopt._functional import Functional
from metaopt.differentiate import Backprop, FirstOrder, Penalty, PointRule, Rule
from metaopt.levels.edge import Edge
from metaopt.levels.joint import JointRule
from metaopt.levels.level import Level
from metaopt.levels.scope import After, Rows, Scene, Shown, evaluate, keep_carried
from metaopt.levels.timetable import Owner, Timetable
from metaopt.levels.trace import Pair, Reading
from metaopt.optimizer import Optimizer
from metaopt.scan import scan

if TYPE_CHECKING:
    from metaopt.levels.state import State

OwnLoss = Callable[[Scene, Rows], tuple[Tensor, After]]
Links = Mapping[str, Mapping[str, tuple[str, str]]]


class Move(NamedTuple):
    """Some steps of a level in a turn, with what is known of them before they happen.

    Attributes:
        level: which.
        steps: how many.
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


@dataclass(frozen=True)
class Plan:
    """Levels, edges, the timetable, what the levels read, and all that follows from these.

    Attributes:
        levels: name -> level.
        edges: at least one.
        order: when which level steps.
        readings: level -> what its loss depends on.
        links: level -> tensor of its optimizer -> (level above, parameter) that this tensor is.
        initial: level -> the state before the first step.
        loops: levels whose lower copies run one after the other, not under `vmap`.
        compile: whether inner loops are compiled.
        nets: level -> its model as a function.
        above: level -> the edges to the levels directly above.
        lowers: level -> the edges to the levels directly below.
        losses: level -> (scene, rows) -> (its own loss, what it says beside it).
        reads_outside: level -> the levels that a step of it reads, apart from those inside it.
            Those that it shares are among them: they need not have moved since its last step.
        read_from_outside: the levels inside whose steps others run that are read by a level
            outside.
        random: the levels whose steps draw from the global random generators.
        rules: (viewpoint, level below) -> how the one differentiates the response of the other.
        moves: owner -> what happens in one turn, in order.
        starts: level -> the edge that says where it begins, if it does not go on from where it
            stood.
        copies_below: level -> how many copies the levels have that run inside its steps, if it is
            itself outside of them.
        direct: the levels for which `responds_at_points`.
        looped: the levels whose loop is compiled by itself, if any is.
        adjustable: the levels whose optimizer has tensors.
        carried: level -> its buffers that have derivatives and matter to a loss.
        ahead: the plan with the optimizers of virtual steps, see `Edge`; None where all look ahead
            with their own.
    """

    levels: Mapping[str, Level]
    edges: tuple[Edge, ...]
    order: Timetable
    readings: Mapping[str, Reading]
    links: Links
    initial: dict[str, State]
    loops: frozenset[str] = frozenset()
    compile: bool = False
    nets: dict[str, Functional] = field(init=False)
    above: dict[str, list[Edge]] = field(init=False)
    lowers: dict[str, list[Edge]] = field(init=False)
    losses: dict[str, OwnLoss] = field(init=False)
    reads_outside: dict[str, tuple[str, ...]] = field(init=False)
    read_from_outside: frozenset[str] = field(init=False)
    random: frozenset[str] = field(init=False)
    rules: dict[tuple[Owner, str], Rule | None] = field(init=False)
    moves: dict[Owner, tuple[Move, ...]] = field(init=False)
    starts: dict[str, Edge | None] = field(init=False)
    copies_below: dict[str, int | None] = field(init=False)
    direct: frozenset[str] = field(init=False)
    looped: frozenset[str] = field(init=False)
    adjustable: frozenset[str] = field(init=False)
    carried: dict[str, frozenset[str]] = field(init=False)
    ahead: Plan | None = field(init=False)

    def __post_init__(self) -> None:
        # Computed once: a compiler cannot look inside what is computed when it is asked for. In
        # this order, since later facts follow from earlier ones.
        levels, edges = self.levels, self.edges
        facts: dict[str, Callable[[], Any]] = {
            "nets": lambda: {name: level.net for name, level in levels.items()},
            "above": lambda: {
                name: [edge for edge in edges if edge.lower.name == name] for name in levels
            },
            "lowers": lambda: {
                name: [edge for edge in edges if edge.upper.name == name] for name in levels
            },
            "rules": lambda: _find_rules(self),
            "reads_outside": lambda: {name: _find_read_outside(self, name) for name in levels},
            "read_from_outside": lambda: self._select(_is_read_from_outside),
            "random": lambda: self._select(_is_random),
            "moves": lambda: {
                owner: tuple(_find_moves(self, owner)) for owner in self.order.events
            },
            "starts": lambda: {
                name: next((edge for edge in self.above[name] if edge.start != "continue"), None)
                for name in levels
            },
            "copies_below": lambda: {name: _find_copies_below(self, name) for name in levels},
            "direct": lambda: self._select(_is_direct),
            "looped": lambda: self._select(_is_looped),
            "adjustable": lambda: self._select(_is_adjustable),
            "carried": lambda: _find_carried(self),
            "losses": lambda: {name: _find_loss(self, name) for name in levels},
            "ahead": lambda: _look_ahead(self),
        }
        for name, find in facts.items():
            object.__setattr__(self, name, find())

    def _select(self, is_so: Callable[[Plan, str], bool]) -> frozenset[str]:
        return frozenset(name for name in self.levels if is_so(self, name))

    def is_top(self, name: str) -> bool:
        """Return True if no level is above."""
        return not self.above[name]

    def rule(self, viewpoint: Owner, name: str) -> Rule | None:
        """Return how `viewpoint` differentiates the response of a level below it.

        None for the graph itself, which does not.

        Raises:
            ValueError: the edges between the two contradict each other.
        """
        pair = (viewpoint, name)
        return self.rules[pair] if pair in self.rules else _find_rule(self, viewpoint, name)

    def responds_at_points(self, name: str) -> bool:
        """Return True if all that responds to `name` does so at points, with nothing inside.

        No such level has copies or responses of its own, and its rules look at one point.

        The derivative of the total loss is then that of the level's own loss and one pullback a
        response.
        """
        return name in self.direct

    @property
    def is_one_function(self) -> bool:
        """Whether a whole step can be compiled as one function.

        So it is where every rule is the plain graph of the steps taken, or one of a top level that
        looks at one point. A compiler cannot wind random numbers back for the latter.
        """
        return all(_is_plain(self, name) or _is_compilable(self, name) for name in self.levels)

    def compiles(self, name: str) -> bool:
        """Return True if the loop of a level is compiled by itself."""
        return self.compile and name in self.looped

    def leading_axes(self, name: str, owner: Owner) -> tuple[int, ...]:
        """Return the axes in front of a batch of `name` in a turn: steps, and batches a step.

        A level on the way that makes one step has no axis.
        """
        axes = (self.levels[name].accumulate,) if self.levels[name].accumulate > 1 else ()
        here: Owner = name
        while here is not None and here != owner:
            axes = (self.order.steps[here], *axes) if self.order.steps[here] > 1 else axes
            here = self.order.owner[here]
        return axes


# What a level's loss is


def _find_loss(plan: Plan, name: str) -> OwnLoss:
    level, reading = plan.levels[name], plan.readings[name]
    loss = partial(
        evaluate,
        level,
        plan.nets,
        reads=(name, *sorted(reading.levels)),
        keeps_statistics=plan.copies_below[name] is None,
        exact=reading.is_delicate,
        carried=plan.carried,
    )
    return loss if level.accumulate == 1 else partial(_accumulate, level, reading, plan, loss)


def _accumulate(
    level: Level, reading: Reading, plan: Plan, loss: OwnLoss, scene: Scene, rows: Rows
) -> tuple[Tensor, After]:
    """Return the mean of a loss over several batches, of one graph at a time."""
    name = level.name
    # a Function answers zero, not None, where there is no dependence
    scene = {
        other: _hold_unread(other, scene[other], reading, other == name)
        for other in (name, *sorted(reading.levels))
    }
    kinds: list[torch.dtype] = []

    def step(scene: Scene, buffers: Any, batch: Any) -> tuple[Any, Tensor]:
        now: Scene = {**scene, name: {"params": scene[name]["params"], "buffers": buffers}}
        value, after = loss(now, {name: batch} if name in rows else {})
        values = [value, *after["metrics"].values()]
        kinds[:] = [value.dtype for value in values]
        wide = reduce(torch.promote_types, kinds)
        return after["buffers"], torch.stack([value.to(wide) for value in values])

    start = scene[name]["buffers"]
    # "steps": the graph of one batch at a time
    buffers, values = scan(step, scene, start, rows.get(name, ()), level.accumulate, "steps")
    mean, *others = [mean.to(kind) for mean, kind in zip(values.mean(0), kinds, strict=True)]
    return mean, {
        "buffers": keep_carried(buffers, name, plan.carried),
        "metrics": dict(zip(reading.metrics, others, strict=True)),
    }


def _hold_unread(name: str, shown: Shown, reading: Reading, is_own: bool) -> Shown:
    """Return what is seen of a level, as constants apart from what a loss depends on."""
    params = {
        key: leaf if (name, key) in reading.params else leaf.detach()
        for key, leaf in shown["params"].items()
    }
    buffers = {
        key: leaf if is_own or (name, key) in reading.buffers else leaf.detach()
        for key, leaf in shown["buffers"].items()
    }
    return {"params": params, "buffers": buffers}


# What it depends on


def find_dependencies(plan: Plan, name: str) -> frozenset[Pair]:
    """Return the (level, parameter) pairs that the loss, optimizer or start of `name` depends on.

    What the buffers that it reads of itself and of levels below depend on is among them; those of a
    level above are constants in this one's step.
    """
    found = plan.readings[name].params | frozenset(plan.links[name].values())
    for level, key in find_buffers_behind(plan, name):
        if level == name or level in plan.order.below[name]:
            found |= {
                (other, param)
                for other, param in plan.readings[level].moves[key]
                if param in plan.levels[other].net.params
            }
    for edge in plan.above[name]:
        if edge.start == "upper" and not isinstance(edge.differentiate, PointRule):
            found |= {(edge.upper.name, key) for key in edge.upper.net.params}
    return found


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
    inside = plan.order.inside[name] | {name}
    read: set[str] = set()
    for other in inside:
        read |= plan.readings[other].levels | {level for level, _ in plan.links[other].values()}
        read |= {
            edge.upper.name for edge in plan.above[other] if edge.start == "upper" and other != name
        }
    # trees are flattened in this order, which must not change from process to process
    return tuple(sorted(read - inside))


def _is_read_from_outside(plan: Plan, name: str) -> bool:
    inside = plan.order.inside[name]
    return any(
        plan.readings[other].levels & inside for other in plan.levels.keys() - inside - {name}
    )


def _is_random(plan: Plan, name: str) -> bool:
    return any(plan.readings[other].is_random for other in plan.order.inside[name] | {name})


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
        (owner, event.level) for owner, events in plan.order.events.items() for event in events
    ]
    pairs += [(name, lower) for name, shared in plan.order.shared.items() for lower in shared]
    return {pair: _find_rule(plan, *pair) for pair in pairs}


def _find_rule(plan: Plan, viewpoint: Owner, name: str) -> Rule | None:
    if viewpoint is None:
        return None
    between = plan.order.below[viewpoint] | {viewpoint}
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
    taken = dict.fromkeys(plan.order.steps, 0)
    for name, steps in plan.order.events[owner]:
        first = taken[name]
        taken[name] += steps
        part = None if steps == plan.order.steps[name] else slice(first, taken[name])
        begins = first % next((edge.steps for edge in plan.above[name]), 1) == 0
        inside = [name, *sorted(plan.order.inside[name])]
        rows = tuple(other for other in inside if plan.levels[other].batches is not None)
        yield Move(name, steps, begins, plan.rule(owner, name), rows, part)


def _find_copies_below(plan: Plan, name: str) -> int | None:
    members = plan.order.members.get(name, ())
    return None if plan.levels[name].copies or not members else plan.levels[members[0]].copies


def _find_responding(plan: Plan, name: str) -> frozenset[str]:
    """Return the levels whose response is part of T, without responses inside of responses."""
    return plan.order.shared[name].union(plan.order.members.get(name, ()))


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


def _is_direct(plan: Plan, name: str) -> bool:
    order = plan.order
    return all(isinstance(rule, PointRule) for rule in _find_response_rules(plan, name)) and all(
        plan.levels[other].copies is None
        and not order.members.get(other)
        and not order.shared[other]
        for other in _find_responding(plan, name)
    )


def _is_plain(plan: Plan, name: str) -> bool:
    """Return True if what responds has rules that are the plain graph of the steps taken."""
    return all(
        isinstance(rule, Backprop | FirstOrder) and rule.memory == "full"
        for rule in _find_response_rules(plan, name)
    )


def _is_compilable(plan: Plan, name: str) -> bool:
    """Return True if what responds to a top level is pulled back at points, without randomness."""
    return (
        plan.is_top(name)
        and plan.responds_at_points(name)
        and not any(isinstance(rule, Penalty) for rule in _find_response_rules(plan, name))
        and not _find_responding(plan, name) & plan.random
    )


def _is_looped(plan: Plan, name: str) -> bool:
    """Return True if no rule inside is a Function of its own, which a compiled loop cannot have."""
    rules = [edge.differentiate for other in plan.order.inside[name] for edge in plan.above[other]]
    return not any(isinstance(rule, PointRule) for rule in rules)


def _look_ahead(plan: Plan) -> Plan | None:
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
