"""What a graph is, apart from its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from metaopt import tree
from metaopt._functional import Functional
from metaopt.differentiate import Backprop, FirstOrder, Penalty, PointRule, Rule
from metaopt.levels.edge import Edge
from metaopt.levels.level import Level
from metaopt.levels.order import Event, Order, Owner
from metaopt.levels.reading import Reading
from metaopt.optimizer import Optimizer
from metaopt.transforms import constant
from metaopt.tree import Tree

Rules = list[tuple[Rule, frozenset[str]]]  # and the upper levels that each is for


class Move(NamedTuple):
    """One event of a turn, with what is known of it before it happens.

    Attributes:
        event: the steps of a level.
        rows: the levels with data that run in these steps.
        part: which of the level's steps in this turn these are; None if they are all.
        begins: whether the level begins anew here, where its edge says so.
        rules: how the owner of the turn differentiates them.
    """

    event: Event
    rows: tuple[str, ...]
    part: slice | None
    begins: bool
    rules: Rules


@dataclass(frozen=True)
class Program:
    """Levels, edges, the order of execution and what the levels read.

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
        reads: level -> the levels that its loss reads, its own among them.
        reads_outside: level -> the levels that a step of it reads, apart from those inside it.
            Those that it shares are among them: they need not have moved since its last step.
        read_from_outside: the levels inside whose steps others run that are read by a level
            outside.
        random: the levels whose steps draw from the global random generators.
        moves: owner -> what happens in one turn, in order.
        starts: level -> the edge that says where it begins, if it does not go on from where it
            stood.
        copies_below: level -> how many copies the levels have that run inside its steps, if it is
            itself outside of them.
        direct: the levels for which `responds_at_points`.
        looped: the levels whose loop is compiled by itself, if any is.
        adjustable: the levels whose optimizer has tensors.
        carried: level -> its buffers that have derivatives and matter to a loss.
        ahead: the program with the optimizers of virtual steps, see `Edge`; None where all look
            ahead with their own.
    """

    levels: Mapping[str, Level]
    edges: tuple[Edge, ...]
    order: Order
    readings: Mapping[str, Reading]
    links: Mapping[str, Mapping[str, tuple[str, str]]]
    initial: dict[str, Tree]
    loops: frozenset[str] = frozenset()
    compile: bool = False
    nets: dict[str, Functional] = field(init=False)
    reads: dict[str, tuple[str, ...]] = field(init=False)
    reads_outside: dict[str, tuple[str, ...]] = field(init=False)
    read_from_outside: frozenset[str] = field(init=False)
    random: frozenset[str] = field(init=False)
    moves: dict[Owner, tuple[Move, ...]] = field(init=False)
    starts: dict[str, Edge | None] = field(init=False)
    copies_below: dict[str, int | None] = field(init=False)
    direct: frozenset[str] = field(init=False)
    looped: frozenset[str] = field(init=False)
    adjustable: frozenset[str] = field(init=False)
    carried: dict[str, frozenset[str]] = field(init=False)
    ahead: Program | None = field(init=False)
    _rules: dict[tuple[Owner, str], Rules] = field(init=False)
    _above: dict[str, list[Edge]] = field(init=False)
    _lowers: dict[str, list[Edge]] = field(init=False)

    def __post_init__(self) -> None:
        known = {
            "nets": {name: level.net for name, level in self.levels.items()},
            "_above": {
                name: [edge for edge in self.edges if edge.lower.name == name]
                for name in self.levels
            },
            "_lowers": {
                name: [edge for edge in self.edges if edge.upper.name == name]
                for name in self.levels
            },
        }
        self._set(**known)
        pairs = [
            (owner, event.level) for owner, events in self.order.events.items() for event in events
        ]
        pairs += [(name, lower) for name, shared in self.order.shared.items() for lower in shared]
        self._set(_rules={pair: self._rules_between(*pair) for pair in pairs})
        self._set(
            reads={name: (name, *sorted(self.readings[name].levels)) for name in self.levels},
            reads_outside={name: self._reads_outside(name) for name in self.levels},
            read_from_outside=frozenset(filter(self._is_read_from_outside, self.levels)),
            random=frozenset(filter(self._is_random, self.levels)),
            moves={owner: tuple(self._moves(owner)) for owner in self.order.events},
            starts={
                name: next((edge for edge in self.above(name) if edge.start != "continue"), None)
                for name in self.levels
            },
            copies_below={name: self._copies_below(name) for name in self.levels},
            direct=frozenset(filter(self._responds_at_points, self.levels)),
            looped=frozenset(filter(self._is_looped, self.levels)),
            adjustable=frozenset(
                name
                for name, level in self.levels.items()
                if [*level.optimizer.parameters(), *level.optimizer.buffers()]
            ),
            carried=self._carried(),
            ahead=self._ahead(),
        )

    def _ahead(self) -> Program | None:
        others = {
            edge.lower.name: edge.look_ahead
            for edge in self.edges
            if isinstance(edge.look_ahead, Optimizer)
        }
        if not others:
            return None
        levels = {
            name: level.with_optimizer(others[name]) if name in others else level
            for name, level in self.levels.items()
        }
        edges = tuple(replace(edge, look_ahead=bool(edge.look_ahead)) for edge in self.edges)
        return replace(self, levels=levels, edges=edges, links=find_links(levels))

    def _set(self, **values: object) -> None:
        """Note what is looked up once: a compiler cannot look inside what is computed when it is
        asked for.
        """
        for key, value in values.items():
            object.__setattr__(self, key, value)

    def above(self, name: str) -> list[Edge]:
        """Return the edges to the levels directly above."""
        return self._above[name]

    def lowers(self, name: str) -> list[Edge]:
        """Return the edges to the levels directly below."""
        return self._lowers[name]

    def is_top(self, name: str) -> bool:
        """Say whether no level is above."""
        return not self.above(name)

    def rules(self, viewpoint: Owner, name: str) -> Rules:
        """Return how `viewpoint` differentiates the response of a level below it: rules, and the
        upper levels each is for.

        The list is empty for the graph itself, which does not. More than one rule is possible where
        all look at one point.

        Raises:
            ValueError: the edges between the two contradict each other.
        """
        known = self._rules.get((viewpoint, name))
        return self._rules_between(viewpoint, name) if known is None else known

    def _rules_between(self, viewpoint: Owner, name: str) -> Rules:
        if viewpoint is None:
            return []
        between = self.order.below[viewpoint] | {viewpoint}
        edges = [edge for edge in self.above(name) if edge.upper.name in between]
        found: Rules = []
        for edge in edges:
            same = [i for i, (rule, _) in enumerate(found) if rule == edge.differentiate]
            if same:
                found[same[0]] = (edge.differentiate, found[same[0]][1] | {edge.upper.name})
            else:
                found.append((edge.differentiate, frozenset({edge.upper.name})))
        path = next((edge for edge in edges if not isinstance(edge.differentiate, PointRule)), None)
        if path is not None and len(found) > 1:
            other = next(edge for edge in edges if edge.differentiate != path.differentiate)
            raise ValueError(
                f"{other}: `differentiate` must be that of {path}, {path.differentiate}, got "
                f"{other.differentiate}. Both are on the way from {viewpoint!r} down to {name!r}, "
                f"whose steps are differentiated in one way."
            )
        return found

    def dependencies(self, name: str) -> frozenset[tuple[str, str]]:
        """Return the (level, parameter) pairs that the loss of `name`, its optimizer or its
        starting point depends on.

        What the buffers that it reads of itself and of levels below depend on is among them; those
        of a level above are constants in this one's step.
        """
        found = self.readings[name].params | frozenset(self.links[name].values())
        for level, key in self.buffers_behind(name):
            if level == name or level in self.order.below[name]:
                moves = self.readings[level].moves[key]
                found |= {
                    (other, param)
                    for other, param in moves
                    if param in self.levels[other].net.params
                }
        for edge in self.above(name):
            if edge.start == "upper" and not isinstance(edge.differentiate, PointRule):
                found |= {(edge.upper.name, key) for key in edge.upper.net.params}
        return found

    def buffers_behind(self, name: str) -> frozenset[tuple[str, str]]:
        """Return the (level, buffer) pairs that the loss of `name` depends on, also through other
        buffers.
        """
        found: set[tuple[str, str]] = set()
        pending = [*self.readings[name].buffers]
        while pending:
            level, key = pair = pending.pop()
            if pair not in found and key in self.readings[level].moves:
                found.add(pair)
                pending += self.readings[level].moves[key]
        return frozenset(found)

    def _carried(self) -> dict[str, frozenset[str]]:
        behind = frozenset().union(*map(self.buffers_behind, self.levels))
        return {
            name: frozenset(key for level, key in behind if level == name)
            for name in {level for level, _ in behind}
        }

    def _reads_outside(self, name: str) -> tuple[str, ...]:
        inside = self.order.inside[name] | {name}
        read: set[str] = set()
        for other in inside:
            read |= self.readings[other].levels | {level for level, _ in self.links[other].values()}
            read |= {
                edge.upper.name
                for edge in self.above(other)
                if edge.start == "upper" and other != name
            }
        # trees are flattened in this order, which must not change from process to process
        return tuple(sorted(read - inside))

    def _is_read_from_outside(self, name: str) -> bool:
        inside = self.order.inside[name]
        return any(
            self.readings[other].levels & inside for other in self.levels.keys() - inside - {name}
        )

    def _is_random(self, name: str) -> bool:
        return any(self.readings[other].is_random for other in self.order.inside[name] | {name})

    def _moves(self, owner: Owner) -> Iterator[Move]:
        taken = dict.fromkeys(self.order.steps, 0)
        for event in self.order.events[owner]:
            name, first = event.level, taken[event.level]
            taken[name] += event.steps
            inside = [name, *sorted(self.order.inside[name])]
            part = None if event.steps == self.order.steps[name] else slice(first, taken[name])
            begins = first % next((edge.steps for edge in self.above(name)), 1) == 0
            with_data = tuple(other for other in inside if self.levels[other].batches is not None)
            yield Move(event, with_data, part, begins, self.rules(owner, name))

    def responds_at_points(self, name: str) -> bool:
        """Say whether every level that responds to `name` has rules that look at one point, and no
        responses of its own.

        The derivative of the total loss is then that of the level's own loss and one pullback a
        response.
        """
        return name in self.direct

    def _responds_at_points(self, name: str) -> bool:
        order = self.order
        return all(
            self.levels[other].copies is None
            and not order.members.get(other)
            and not order.shared[other]
            and all(isinstance(rule, PointRule) for rule, _ in self.rules(name, other))
            for other in self._responding(name)
        )

    @property
    def is_one_function(self) -> bool:
        """Whether a whole step can be compiled as one function.

        So it is where every rule is the plain graph of the steps taken, or one of a top level that
        looks at one point. A compiler cannot wind random numbers back for the latter.
        """
        return all(self._is_plain(name) or self._is_direct(name) for name in self.levels)

    def _is_plain(self, name: str) -> bool:
        rules = [rule for other in self._responding(name) for rule, _ in self.rules(name, other)]
        return all(
            isinstance(rule, Backprop | FirstOrder) and rule.memory == "full" for rule in rules
        )

    def _is_direct(self, name: str) -> bool:
        rules = [rule for other in self._responding(name) for rule, _ in self.rules(name, other)]
        return (
            self.is_top(name)
            and self.responds_at_points(name)
            and not any(isinstance(rule, Penalty) for rule in rules)
            and not self._responding(name) & self.random
        )

    def _responding(self, name: str) -> frozenset[str]:
        """Return the levels whose response is part of the total loss of `name`, apart from
        responses inside of responses.
        """
        return self.order.shared[name].union(self.order.members.get(name, ()))

    def compiles(self, name: str) -> bool:
        """Say whether the loop of a level is compiled by itself."""
        return self.compile and name in self.looped

    def _is_looped(self, name: str) -> bool:
        """Say whether no rule inside is a Function of its own, which a compiled loop cannot have."""
        rules = [
            edge.differentiate for other in self.order.inside[name] for edge in self.above(other)
        ]
        return not any(isinstance(rule, PointRule) for rule in rules)

    def _copies_below(self, name: str) -> int | None:
        members = self.order.members.get(name, ())
        return None if self.levels[name].copies or not members else self.levels[members[0]].copies

    def leading_axes(self, name: str, owner: Owner) -> tuple[int, ...]:
        """Return the axes in front of a batch of `name` among the rows of one turn of `owner`:
        steps, and batches a step.

        A level on the way that makes one step has no axis.
        """
        axes = (self.levels[name].accumulate,) if self.levels[name].accumulate > 1 else ()
        here: Owner = name
        while here is not None and here != owner:
            axes = (self.order.steps[here], *axes) if self.order.steps[here] > 1 else axes
            here = self.order.owner[here]
        return axes


def find_links(levels: Mapping[str, Level]) -> dict[str, dict[str, tuple[str, str]]]:
    """Return level -> tensor of its optimizer -> (level, parameter): the optimizers' parameters
    that a level learns.
    """
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


def shown(state: Tree) -> Tree:
    """Return the part of a level's state that others can read."""
    return {"params": state["params"], "buffers": state["buffers"]}


def all_shown(states: Mapping[str, Tree]) -> Tree:
    """Return what others can read of these levels, and of the ones inside their steps."""
    scene: Tree = {}
    for name, state in states.items():
        scene |= {name: shown(state)} | all_shown(state["below"])
    return scene


def rest(state: Tree) -> Tree:
    """Return a level's state without its parameters."""
    return {key: value for key, value in state.items() if key != "params"}


def detached(values: Tree) -> Tree:
    """Return constants."""
    return tree.map(constant, values)
