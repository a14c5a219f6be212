"""What a graph is, apart from its tensors: every fact about it that a step looks up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from metaopt._functional import Functional
from metaopt.differentiate import Rule
from metaopt.distributed import Ranks
from metaopt.levels.edge import Edge
from metaopt.levels.facts import FACTS, Links, Move, find_rule, is_compilable, is_plain
from metaopt.levels.level import Level
from metaopt.levels.own_loss import OwnLoss
from metaopt.levels.reading import Reading
from metaopt.levels.timetable import Owner, Timetable

if TYPE_CHECKING:
    from metaopt.levels.state import State


@dataclass(frozen=True)
class Plan:
    """Levels, edges, the timetable, what the levels read, and all that follows from these.

    Attributes:
        levels: name -> level.
        edges: at least one.
        timetable: when which level steps.
        readings: level -> what its loss depends on.
        links: level -> tensor of its optimizer -> (level above, parameter) that this tensor is.
        initial: level -> the state before the first step; in the end of those that begin anew.
        sequential_copies: levels whose lower copies run one after the other, not under `vmap`.
        compile: whether inner loops are compiled.
        ranks: which share the batches of each level.
        nets: level -> its model as a function.
        above: level -> the edges to the levels directly above.
        lowers: level -> the edges to the levels directly below.
        losses: level -> (scene, rows) -> (its own loss, `After`).
        reads_outside: level -> the levels that a step of it reads, apart from those inside it.
            Those that it shares are among them: they need not have moved since its last step.
        read_from_outside: the levels inside whose steps others run that are read by a level
            outside.
        random: the levels whose steps draw from the global random generators.
        rules: (viewpoint, level below) -> how the one differentiates the response of the other.
        moves: owner -> what happens in one turn, in order.
        starts: level -> the edge that says where it begins, if it does not go on from where it
            stood.
        copies_below: level -> number of copies of the levels that run inside its steps, if it is
            itself outside of them.
        responding_at_points: the levels for which `responds_at_points`.
        tried: the levels whose step may be a `Trial` until the graph's step has succeeded.
        held_by_models: the levels whose parameters lie in the memory of their models.
        separately_compiled: the levels whose loop is compiled by itself, if `compile` is set.
        adjustable: the levels whose optimizer has tensors.
        carried: level -> its buffers that have derivatives and matter to a loss.
        virtual: the plan with the optimizers of virtual steps, see `look_ahead` of `Edge`; None
            where all look ahead with their own.
    """

    levels: Mapping[str, Level]
    edges: tuple[Edge, ...]
    timetable: Timetable
    readings: Mapping[str, Reading]
    links: Links
    initial: dict[str, State]
    sequential_copies: frozenset[str]
    compile: bool
    ranks: Ranks
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
    responding_at_points: frozenset[str] = field(init=False)
    tried: frozenset[str] = field(init=False)
    held_by_models: frozenset[str] = field(init=False)
    separately_compiled: frozenset[str] = field(init=False)
    adjustable: frozenset[str] = field(init=False)
    carried: dict[str, frozenset[str]] = field(init=False)
    virtual: Plan | None = field(init=False)

    def __post_init__(self) -> None:
        # Once: a compiler cannot look inside what is computed when it is asked for.
        for name, find in FACTS.items():
            object.__setattr__(self, name, find(self))

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
        return self.rules[pair] if pair in self.rules else find_rule(self, viewpoint, name)

    def responds_at_points(self, name: str) -> bool:
        """Return True if all rules of what responds to `name` are PointRules, with nothing inside.

        The levels that respond have neither copies nor responses of their own. The derivative of
        the total loss is then that of the level's own loss, and one pullback for each response.
        """
        return name in self.responding_at_points

    @property
    def is_one_function(self) -> bool:
        """Whether a whole step can be compiled as one function.

        True if for each level every rule is the plain graph of the steps, or the level is a top one
        whose rules are PointRules: for these a compiler cannot wind random numbers back.
        """
        return all(is_plain(self, name) or is_compilable(self, name) for name in self.levels)

    def compiles(self, name: str) -> bool:
        """Return True if the loop of a level is compiled by itself."""
        return self.compile and name in self.separately_compiled

    def leading_axes(self, name: str, owner: Owner) -> tuple[int, ...]:
        """Return the sizes of the axes in front of a batch of `name` in a turn.

        They are those of steps, and of batches in a step; a level on the way that makes one step
        has no axis.
        """
        axes = (self.levels[name].accumulate,) if self.levels[name].accumulate > 1 else ()
        here: Owner = name
        while here is not None and here != owner:
            axes = (self.timetable.steps[here], *axes) if self.timetable.steps[here] > 1 else axes
            here = self.timetable.owner[here]
        return axes
