"""The graph of levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.autodiff.graph import VARIABLES
from metaopt.batching import prefers_loop
from metaopt.checks import NonFiniteError
from metaopt.compiled import compiled
from metaopt.differentiate import EvolutionStrategy
from metaopt.levels.checks import check_program, named_levels
from metaopt.levels.data import Stream, arranged
from metaopt.levels.draw import draw
from metaopt.levels.edge import Edge
from metaopt.levels.execution import Execution
from metaopt.levels.level import Level
from metaopt.levels.order import Owner, arrange
from metaopt.levels.program import Program, all_shown, find_links, rest
from metaopt.levels.reading import Pair, Reading, read, read_all
from metaopt.levels.state import check_state
from metaopt.levels.text import describe
from metaopt.levels.update import initial_state, values_of
from metaopt.levels.window import NO_WINDOW, Happened, Window, advanced, opened
from metaopt.torch_internals import foreach_copy_
from metaopt.transforms import values_are_readable
from metaopt.tree import Tree


class LevelGraph:
    """Optimisation problems that depend on each other: every level minimises its loss given the
    levels above it.

    For a level u with parameters w, and the levels below it responding to w:  T_u(w) = L_u(w,
    levels above, responses(w)).  A step of u uses dT_u/dw through every path of edges below it,
    each edge contributing its own rule. What a lower level minimises on the way is its own T: three
    levels of `Backprop` are one composed unroll.

    Constructing a graph evaluates every loss once, on the first batch (which the first step sees
    again), to learn what it reads: a level steps when the levels below that its loss reads have
    made their steps; those it does not read follow it. A loss that calls none of the functions
    whose derivatives `any_order` corrects is from then on evaluated without it.

    Args:
        edges: which connect the levels.
        compile: compile the whole step, which unrolls all steps of all levels, where every rule is
            `Backprop` or `FirstOrder` with memory "full", or stands below a top level and looks at
            a point (`FiniteDifference`, `Implicit`, ..., but not `Penalty`, nor where the lower
            level's loss is random); otherwise the inner loops and the pullbacks of rules. See
            `compiled`.

    Raises:
        ValueError: the levels do not fit together; the message names them.
        TypeError: something is no edge.

    Cost:
        Of one step: the steps of the lower levels, and for each level above others one pullback a
        response below it, however many paths there are. A level whose own loss reads levels below
        has their responses in its gradient, and so in the pullback of its rule: where such levels
        nest, their costs multiply.
    """

    def __init__(self, edges: Sequence[Edge], *, compile: bool = False):
        levels = named_levels(edges)
        self._streams = {
            name: Stream(name, level.batches, level.device) for name, level in levels.items()
        }
        readings = read_all(lambda name, buffers: self._read(name, levels, edges, buffers), levels)
        order = arrange(edges, {name: reading.levels for name, reading in readings.items()})
        lower = {edge.lower.name for edge in edges}
        initial = {
            name: initial_state(
                level, readings[name], is_top=name not in lower, steps=order.total[name]
            )
            for name, level in levels.items()
        }
        loops = _loops(edges, lambda name: self._read(name, levels, edges))
        self.program = Program(
            levels, tuple(edges), order, readings, find_links(levels), initial, loops, compile
        )
        check_program(self.program)
        self._execution = Execution(self.program)
        self._turn = (
            compiled(self._execution.turn)
            if compile and self.program.is_one_function
            else self._execution.turn
        )
        self._states = {name: self._begin(name) for name in order.members[None]}
        self._steps = 0

    def step(self) -> dict[str, float | Tensor]:
        """Make one step of the top levels, and what the levels below make for it; return losses and
        metrics by "level/name".

        Of several top levels that share a lower one, each makes the smallest number of steps after
        which all are done at once; `print(graph)` shows it. Losses and metrics are those of each
        level's last step.

        All that changes is the graph's state, and, when the step has succeeded, the values in the
        levels' models (but not of levels with `copies`).

        Raises:
            NonFiniteError: a loss, or the gradient of a top level, is not finite; the state is then
                that before the step.
            ValueError: no derivative arrives at a parameter, batches do not fit, or it is called in
                inference mode or inside a transform of `torch.func`.
        """
        _check_surroundings("step")
        rows, counts = self._rows(None)
        with torch.no_grad():
            _, states = self._turn(None, {}, self._states, rows)
        metrics = _checked(states, self._steps)
        for name, count in counts.items():
            self._streams[name].take(count)
        self._states = states
        self._steps += 1
        self._load()
        return metrics

    def hypergradient(self, level: str, *, after_steps: bool = False) -> Params:
        """Return dT/dw of a level by parameter name, at the present state; nothing steps, and no
        batch is used up.

        Rules that look at where steps end do so at the levels' present values. Those that
        differentiate steps look ahead along the steps that the lower levels would make next.

        Args:
            level: whose.
            after_steps: let all rules look ahead, at levels that no other level shares: what the
                level's next step would use.

        Raises:
            ValueError: there is no such level.
        """
        _check_surroundings("hypergradient")
        state, scene, rows, window = self._view(level)
        with torch.no_grad():
            execution, state = self._execution.looking_ahead(level, state)
            return execution.gradient(level, scene, state, rows, window, at_point=not after_steps)[
                0
            ]

    def params(self, level: str) -> Params:
        """Return a level's present parameters, by name."""
        params: Params = self._view(level)[0]["params"]
        return params

    def objective(self, level: str, params: Params) -> Tensor:
        """Return T(w), a level's loss after the steps that the levels below would make next, at
        other parameters w than its own.

        Args:
            level: whose.
            params: w, by name.

        Raises:
            ValueError: there is no such level.
        """
        state, scene, rows, window = self._view(level)
        with torch.no_grad():
            execution, state = self._execution.looking_ahead(level, state)
            return execution.total(level, params, scene, rest(state), rows, window, at_point=False)[
                0
            ]

    def values(self) -> dict[str, float | Tensor]:
        """Return the values of all hyperparameters in the levels' next steps, by "level/name":
        those of schedules, learned rates.

        A schedule that observes the loss is given that of the level's last step. Of copies it is
        their mean.
        """
        with torch.no_grad():
            found = {
                name: values_of(level, self._state(name))
                for name, level in self.program.levels.items()
            }
        return {
            f"{name}/{key}": value
            for name, values in found.items()
            for key, value in values.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, apart from the order of the data and the
        global random state.
        """
        return {
            "levels": self._states,
            "initial": dict(self.program.initial),
            "data": {name: one.position for name, one in self._streams.items()},
            "steps": self._steps,
            "draws": {str(edge): rule.draws for edge, rule in self._drawing()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state, also in the levels' models. Data is wound to where it was, generators
        go on from where they are.

        Raises:
            ValueError: it is the state of another graph; then nothing is changed.
        """
        check_state(state, self.state_dict())
        self._states, self._steps = state["levels"], state["steps"]
        self.program.initial.update(state["initial"])
        for edge, rule in self._drawing():
            rule.wind_to(state["draws"][str(edge)])
        for name, position in state["data"].items():
            self._streams[name].seek(position)
        self._load()

    def draw(self, path: str | Path) -> None:
        """Write a picture of the levels and edges to a file, in the format of its suffix."""
        draw(self.program, path)

    def __str__(self) -> str:
        return describe(self.program, self.values())

    def _drawing(self) -> list[tuple[Edge, EvolutionStrategy]]:
        """Return the edges whose rules draw noise of their own."""
        rules = [(edge, edge.differentiate) for edge in self.program.edges]
        return [(edge, rule) for edge, rule in rules if isinstance(rule, EvolutionStrategy)]

    # Building

    def _read(
        self,
        name: str,
        levels: dict[str, Level],
        edges: Sequence[Edge],
        buffers: Collection[Pair] = frozenset(),
    ) -> Reading:
        level, batch = levels[name], None
        is_above_copies = any(edge.lower.copies for edge in edges if edge.upper is level)
        if level.batches is not None:
            (batch,) = self._streams[name].peek(1)
        if level.copies or is_above_copies:
            batch = None if level.batches is None else tree.index(batch, 0)
        keeps = level.copies is not None or not is_above_copies
        return read(
            level,
            {other: one.net for other, one in levels.items()},
            batch,
            buffers=buffers,
            keeps_statistics=keeps,
        )

    def _begin(self, name: str) -> Tree:
        """Return a level's first state, with those of the levels that run inside its steps."""
        state, copies = self.program.initial[name], self.program.levels[name].copies
        if copies:
            state = tree.map(lambda leaf: leaf.expand(copies, *leaf.shape).clone(), state)
        return {
            **state,
            "below": {
                other: self._begin(other) for other in self.program.order.members.get(name, ())
            },
        }

    # State and data

    def _state(self, name: str) -> Tree:
        owner = self.program.order.owner[name]
        return (self._states if owner is None else self._state(owner)["below"])[name]

    def _rows(self, owner: Owner) -> tuple[Tree, dict[str, int]]:
        """Return the next batches of one turn of `owner`, and how many they are, by level."""
        program, rows, counts = self.program, {}, {}
        for name in program.levels:
            inside = owner in (None, name) or name in program.order.inside[owner]
            if inside and program.levels[name].batches is not None:
                axes = program.leading_axes(name, owner)
                counts[name] = math.prod(axes)
                rows[name] = arranged(name, self._streams[name].peek(counts[name]), axes)
        return rows, counts

    def _view(self, level: str) -> tuple[Tree, Tree, Tree, Window]:
        """Return what a look at a level's step takes: its state, the scene, the next batches, and
        the window.

        Raises:
            ValueError: there is no such level, or it has copies.
        """
        if level not in self.program.levels:
            raise ValueError(
                f"LevelGraph: `level` must be one of {list(self.program.order.levels)}, got "
                f"{level!r}."
            )
        if self.program.levels[level].copies:
            raise ValueError(
                f"level {level!r} has `copies`, each with a gradient of its own. Ask for that of a "
                f"level above."
            )
        return self._state(level), all_shown(self._states), self._rows(level)[0], self._ahead(level)

    def _ahead(self, name: str) -> Window:
        """Return what will happen to the levels that `name` shares with others until its next step,
        if all others stay.
        """
        order = self.program.order
        owner, shared = order.owner[name], order.shared[name]
        if not shared:
            return NO_WINDOW
        (rows, _), scene, taken = (
            self._rows(owner),
            all_shown(self._states),
            dict.fromkeys(sorted(shared), 0),
        )
        states = {lower: self._state(lower) for lower in order.members[owner]}
        windows = opened([lower for lower in order.levels if lower in states], order.shared, states)
        for event in itertools.takewhile(lambda event: event.level != name, order.events[owner]):
            if (lower := event.level) in shared:
                part = {
                    other: rows[other]
                    for other in sorted(order.inside[lower] | {lower})
                    if other in rows
                }
                if event.steps < order.steps[lower]:
                    part = tree.index(part, slice(taken[lower], taken[lower] + event.steps))
                happened = Happened(event, scene, part, states[lower], taken[lower] == 0)
                windows = advanced(happened, windows, order.shared, states)
                taken[lower] += event.steps
        return windows[name]

    def _load(self) -> None:
        """Write the present values into the levels' models."""
        models: list[Tensor] = []
        values: list[Tensor] = []
        for name, shown in all_shown(self._states).items():
            net = self.program.nets[name]
            if self.program.levels[name].copies:
                continue
            for own, now in (
                (net.params, shown["params"]),
                (net.buffers if shown["buffers"] else {}, shown["buffers"]),
            ):
                models += own.values()
                values += map(now.__getitem__, own)
        with torch.no_grad():
            foreach_copy_(models, values)


def _check_surroundings(method: str) -> None:
    """Raise where derivatives would be lost, or the graph's state would belong to a transform that
    ends.
    """
    inside = None
    if VARIABLES.get():
        inside = "a loss that is being differentiated, which its steps would be left out of"
    elif torch.is_inference_mode_enabled():
        inside = (
            "torch.inference_mode(), where nothing is recorded that derivatives could be taken of"
        )
    elif not (torch.compiler.is_compiling() or values_are_readable()):
        inside = "a transform of torch.func, which its state would outlive"
    if inside is not None:
        raise ValueError(f"LevelGraph.{method} was called inside {inside}. Call it outside.")


def _loops(edges: Sequence[Edge], read: Callable[[str], Reading]) -> frozenset[str]:
    """Return the levels above copies that are faster one after the other."""
    return frozenset(
        edge.upper.name
        for edge in edges
        if edge.lower.copies
        and prefers_loop(
            lambda _, edge: (read(edge.lower.name), read(edge.upper.name)),
            edge.lower.net.params,
            edge,
        )
    )


def _checked(states: Tree, step: int) -> dict[str, float | Tensor]:
    """Return the losses and metrics in these states.

    Args:
        states: after a step of the graph.
        step: which one; levels that make several count for themselves.

    Raises:
        NonFiniteError: a loss is not finite, or the gradient of a top level.
    """
    metrics: dict[str, float | Tensor] = {}
    for name, state in states.items():
        metrics |= _checked(state["below"], step)
        progress, loss = state["progress"], state["progress"]["loss"]
        values = loss.reshape(-1).tolist() if loss.ndim else [loss.tolist()]
        if not all(map(math.isfinite, values)):
            first = [*map(math.isfinite, values)].index(False)
            at = progress["steps"].reshape(-1).tolist()[first] - 1 if "steps" in progress else step
            raise NonFiniteError(f"level {name!r}", at, values[first])
        norm = state["metrics"].get("gradient norm", loss)
        if not math.isfinite(norm.mean()):
            raise NonFiniteError(f"level {name!r}", step, float(norm.mean()), what="gradient norm")
        found = {"loss": loss, **state["metrics"]}
        metrics |= {
            f"{name}/{key}": metric.mean() if metric.ndim else metric
            for key, metric in found.items()
        }
    return metrics
