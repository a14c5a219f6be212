"""The graph of levels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.autodiff.graph import VARIABLES
from metaopt.batching import prefers_loop
from metaopt.checks import NonFiniteError, find_not_finite
from metaopt.compiled import compile_whole
from metaopt.differentiate import EvolutionStrategy
from metaopt.differentiate.statistics import gathering
from metaopt.distributed import check_agreement, current_ranks, own_noise
from metaopt.levels.backward import take_total_gradient
from metaopt.levels.check_plan import check_plan, check_state, name_levels
from metaopt.levels.data import LevelData, peek_rows
from metaopt.levels.edge import Edge
from metaopt.levels.facts import find_links
from metaopt.levels.forward import run_turn, total_loss
from metaopt.levels.history import NO_WINDOW, Record, Window, make_inputs, open_window
from metaopt.levels.level import Level
from metaopt.levels.models import part_from_models, share_with_models, write_into_models
from metaopt.levels.plan import Plan
from metaopt.levels.reading import Pair, Reading, read, read_all
from metaopt.levels.scope import Rows, Scene
from metaopt.levels.show import describe_graph, draw
from metaopt.levels.state import (
    State,
    States,
    find_values,
    make_initial_state,
    make_tried_steps,
    show_all,
    without_params,
)
from metaopt.levels.telling import OnStep, telling
from metaopt.levels.timetable import arrange
from metaopt.levels.top_step import begin_virtual_steps, step_top_level
from metaopt.spare import Spare
from metaopt.transforms import values_are_readable


class LevelGraph:
    """Optimisation problems that depend on each other, each given the levels above it.

    For a level u with parameters w, and the levels below it responding to w:  T_u(w) = L_u(w,
    levels above, responses(w)).  A step of u uses dT_u/dw through every path of edges below it,
    each edge contributing its own rule. What a lower level minimises on the way is its own T: three
    levels of `Backprop` are one composed unroll.

    Constructing a graph evaluates every loss once, on the first batch (which the first step sees
    again), to learn what it reads: a level steps when the levels below that its loss reads have
    made their steps; those it does not read follow it. A loss that calls none of the functions
    whose derivatives `any_order` corrects is from then on evaluated without it.

    Inside of `join_ranks`, where every rank is given the same models and batches, each rank
    evaluates the losses on its part of every batch. They are taken for means over the examples;
    a loss that is not, and a norm layer with batch statistics, sees one rank's part at a time. All
    derivatives are those of the mean over ranks, under every rule.

    Args:
        edges: which connect the levels.
        compile: compile the whole step, which unrolls all steps of all levels, where every rule is
            `Backprop` or `FirstOrder` with memory "full", or stands below a top level and looks at
            a point (`FiniteDifference`, `Implicit`, ..., but not `Penalty`, nor where the lower
            level's loss is random); otherwise the inner loops and the pullbacks of rules. See
            `compile_whole`.

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
        levels = name_levels(edges)
        self._data = {
            name: LevelData(name, level.batches, level.device) for name, level in levels.items()
        }
        find = partial(_read, levels, edges, self._data)
        readings = read_all(find, levels)
        timetable = arrange(edges, {name: reading.levels for name, reading in readings.items()})
        lower = {edge.lower.name for edge in edges}
        initial = {
            name: make_initial_state(
                level, readings[name], is_top=name not in lower, steps=timetable.total[name]
            )
            for name, level in levels.items()
        }
        self.plan = Plan(
            levels,
            tuple(edges),
            timetable,
            readings,
            links=find_links(levels),
            initial=initial,
            sequential_copies=_find_sequential_copies(edges, find),
            compile=compile,
            ranks=current_ranks(),
        )
        check_plan(self.plan)
        _check_ranks(self.plan, self._data)
        self._run_turn = _make_turn(self.plan)
        self._spare = Spare()  # what held the state before last holds the next
        self._states = {
            name: _make_first_state(self.plan, name) for name in timetable.members[None]
        }
        # only a level that begins anew looks at how it began: of a large one, three copies less
        for name in [name for name in levels if self.plan.starts[name] is None]:
            del self.plan.initial[name]
        self._states = self._held = share_with_models(self.plan, self._states)
        self._steps = 0

    def step(self, on_step: OnStep | None = None) -> dict[str, float | Tensor]:
        """Make one step of the top levels and what it takes below; return losses by name.

        The names of losses and metrics are "level/name". Of a top level there is the "gradient
        norm", that of its hypergradient; of a level below whose rule solves a linear system,
        "solver residual" and "solver steps", for its last response.

        Of several top levels that share a lower one, each makes the smallest number of steps after
        which all are done at once; `print(graph)` shows it. Losses and metrics are those of each
        level's last step.

        All that changes is the graph's state, and, when the step has succeeded, the values in the
        levels' models (but not of levels with `copies`). Parameters have no other memory than the
        models': what is written into a model between two steps, the next one starts from. Its
        buffers are the graph's own. Ctrl-C in the moment in which a large step is made in place
        leaves the graph between two states; a `Trainer` holds it back until the step has ended.

        Args:
            on_step: called after each step of each level with (its name, the number of its steps
                so far, {"loss": L, its metrics}): tensors without a graph, on their device; nothing
                waits for their values unless it reads them. Of copies the tensors have one number
                each, or, where the copies run one after the other, each is told by itself. A step
                that fails has told of what came before.

        Raises:
            NonFiniteError: a loss, or the gradient of a top level, is not finite; the state is then
                that before the step.
            ValueError: no derivative arrives at a parameter, batches do not fit, or it is called in
                inference mode or inside a transform of `torch.func`; or with `on_step` where loops
                are compiled.
        """
        _check_surroundings("step")
        if on_step is not None and self.plan.compile:
            raise ValueError(
                "LevelGraph.step: a compiled loop cannot report each of its steps, got "
                f"on_step={on_step!r} and compile=True. Leave `compile` out; losses and metrics of "
                "each level's last step are what `step` returns."
            )
        self._look_at_models()
        rows, counts = peek_rows(self.plan, self._data, None)
        with torch.no_grad(), gathering() as gathered, self._drawn_again() as drawn:
            with (
                own_noise(self.plan.ranks),
                telling(on_step, self._count_steps()),
                self._spare.used(),
            ):
                _, states = self._run_turn(self._states, rows)
            # until here nothing has changed, and no batch is gone
            _raise_if_not_finite(states, self._steps, _suggest_scale(self.plan.levels))
            drawn.clear()
        for name, count in counts.items():
            self._data[name].take(count)
        states = part_from_models(self.plan, states)
        self._settle(make_tried_steps(states))
        self._steps += 1
        return _find_metrics(states) | gathered.found

    def hypergradient(self, level: str, *, after_steps: bool = False) -> Params:
        """Return dT/dw of a level by parameter name, at the present state; nothing steps.

        No batch is used up.

        Rules that look at where steps end do so at the levels' present values. Those that
        differentiate steps look ahead along the steps that the lower levels would make next.

        Args:
            level: its name.
            after_steps: let all rules look ahead, at levels that no other level shares: what the
                level's next step would use.

        Raises:
            ValueError: there is no such level.
        """
        _check_surroundings("hypergradient")
        state, scene, rows, window = self._view(level)
        with torch.no_grad(), self._drawn_again(), own_noise(self.plan.ranks):
            plan, state = begin_virtual_steps(self.plan, level, state)
            grads, *_ = take_total_gradient(
                plan, level, scene, state, rows, window, at_point=not after_steps
            )
        return grads

    def params(self, level: str) -> Params:
        """Return copies of a level's present parameters, by name."""
        return {key: _copy(param) for key, param in self._view(level)[0]["params"].items()}

    def objective(self, level: str, params: Params) -> Tensor:
        """Return T(w), the loss after the next steps of the levels below, at other parameters w.

        Args:
            level: its name.
            params: w, by name.

        Raises:
            ValueError: there is no such level.
        """
        state, scene, rows, window = self._view(level)
        inputs = make_inputs(scene, window, rows)
        with torch.no_grad(), own_noise(self.plan.ranks):
            plan, state = begin_virtual_steps(self.plan, level, state)
            memory = without_params(state)
            return total_loss(plan, level, "around", inputs, params, memory, rows)[0]

    def values(self) -> dict[str, float | Tensor]:
        """Return the values of all hyperparameters in the levels' next steps, by "level/name".

        Among them are those of schedules and learned rates.

        A schedule that observes the loss is given that of the level's last step. Of copies it is
        their mean.
        """
        self._look_at_models()
        with torch.no_grad():
            return {
                f"{name}/{key}": value
                for name, level in self.plan.levels.items()
                for key, value in find_values(level, self._state(name)).items()
            }

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, but for the random state that losses draw from.

        Of data it is the number of the next batch, and of a `DataLoader` the random state that
        its order came from. The tensors are copies: later steps do not change them.
        """
        return tree.map(_copy, self._read_state())  # type: ignore[no-any-return]

    def _read_state(self) -> dict[str, Any]:
        self._look_at_models()
        return {
            "levels": self._states,
            "initial": dict(self.plan.initial),
            "data": {name: one.place() for name, one in self._data.items()},
            "steps": self._steps,
            "draws": {str(edge): rule.draws for edge, rule in self._drawing()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a state, also in the levels' models.

        Data is wound to where it was: a `DataLoader` reads the batches before that place again, of
        the order they were in; an iterator can only go on, and one that is past it stays where it
        is. `Shuffled` is there at once.

        Raises:
            ValueError: it is the state of another graph; then nothing is changed.
        """
        check_state(state, self._read_state())
        for name, one in self._data.items():
            one.check(state["data"][name])
        levels = tree.map(_move, state["levels"], self._states)
        self._steps = state["steps"]
        self.plan.initial.update(tree.map(_move, state["initial"], dict(self.plan.initial)))
        for edge, rule in self._drawing():
            rule.wind_to(state["draws"][str(edge)])
        for name, place in state["data"].items():
            self._data[name].seek(place)
        self._settle(levels)

    def draw(self, path: str | Path) -> None:
        """Write a picture of the levels and edges to a file, in the format of its suffix."""
        draw(self.plan, path)

    def __str__(self) -> str:
        return describe_graph(self.plan, self.values())

    @contextmanager
    def _drawn_again(self) -> Iterator[list[tuple[EvolutionStrategy, int]]]:
        """While entered, rules draw noise that they will draw again; not those taken off the list.

        The list has rules with their counts.
        """
        before = [(rule, rule.draws) for _, rule in self._drawing()]
        try:
            yield before
        finally:
            for rule, draws in before:
                rule.wind_to(draws)

    def _drawing(self) -> list[tuple[Edge, EvolutionStrategy]]:
        """Return the edges whose rules draw noise of their own."""
        return [
            (edge, edge.differentiate)
            for edge in self.plan.edges
            if isinstance(edge.differentiate, EvolutionStrategy)
        ]

    def _count_steps(self) -> dict[str, int]:
        """Return the number of steps that each level has made."""
        return {name: self._steps * count for name, count in self.plan.timetable.total.items()}

    def _state(self, name: str) -> State:
        owner = self.plan.timetable.owner[name]
        states: States = self._states if owner is None else self._state(owner)["below"]
        return states[name]

    def _view(self, level: str) -> tuple[State, Scene, Rows, Window]:
        """Return what a look at a level's step takes: its state, the scene, batches and window.

        Raises:
            ValueError: there is no such level, or it has copies.
        """
        if level not in self.plan.levels:
            raise ValueError(
                f"LevelGraph: `level` must be one of {[*self.plan.timetable.levels]}, "
                f"got {level!r}."
            )
        if self.plan.levels[level].copies:
            raise ValueError(
                f"level {level!r} has `copies`, each with a gradient of its own. Ask for that of a "
                f"level above."
            )
        self._look_at_models()
        rows, _ = peek_rows(self.plan, self._data, level)
        return self._state(level), show_all(self._states), rows, self._predict_window(level)

    def _predict_window(self, name: str) -> Window:
        """Return what will happen to the levels that `name` shares until its next step.

        All others stay.
        """
        plan = self.plan
        if not plan.timetable.shared[name]:
            return NO_WINDOW
        owner = plan.timetable.owner[name]
        rows, _ = peek_rows(plan, self._data, owner)
        states = {lower: self._state(lower) for lower in plan.timetable.members[owner]}
        scene, records = show_all(self._states), []
        for move in itertools.takewhile(lambda move: move.level != name, plan.moves[owner]):
            lower, part = move.level, move.take(rows)
            records.append(Record(lower, move.steps, move.begins, scene, part, states[lower]))
        return open_window(plan, name, states, records)

    def _look_at_models(self) -> None:
        """Take the parameters from the memory in which the models have them now.

        It may be another than after the last step: where a model was moved to a device and back, or
        weights were assigned to it, or the graph was copied.
        """
        if self._states is self._held:  # else a step was interrupted while it wrote into the models
            self._states = self._held = share_with_models(self.plan, self._states)

    def _settle(self, states: States) -> None:
        """Make states the present ones, also in the levels' models.

        After each line the graph's state is a whole one, should an interruption come between.
        """
        before = self._states if self._states is self._held else {}
        self._states = states
        write_into_models(self.plan, states, before)
        self._states = self._held = share_with_models(self.plan, states)


def _copy(leaf: Any) -> Any:
    """Return a leaf that steps in place do not change."""
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _move(leaf: Any, own: Any) -> Any:
    """Return a copy of a leaf on the graph's own device, where a file knows the CPU alone."""
    return leaf.to(own.device, copy=True) if isinstance(leaf, Tensor) else leaf


def _check_surroundings(method: str) -> None:
    """Raise where derivatives would be lost, or the state would belong to a transform."""
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


def _read(
    levels: dict[str, Level],
    edges: Sequence[Edge],
    data: dict[str, LevelData],
    name: str,
    buffers: Collection[Pair] = frozenset(),
) -> Reading:
    """Return what a level's loss reads, seen on its first batch."""
    level, batch = levels[name], None
    is_above_copies = any(edge.lower.copies for edge in edges if edge.upper is level)
    if level.batches is not None:
        (batch,) = data[name].peek(1)
        if level.copies or is_above_copies:
            batch = tree.index(batch, 0)
    keeps = level.copies is not None or not is_above_copies
    nets = {other: one.net for other, one in levels.items()}
    return read(level, nets, batch, buffers=buffers, keeps_statistics=keeps)


def _find_sequential_copies(
    edges: Sequence[Edge], read: Callable[[str], Reading]
) -> frozenset[str]:
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


def _check_ranks(plan: Plan, data: dict[str, LevelData]) -> None:
    """Raise where several ranks would not be one run: what is replicated must be so."""
    if not plan.ranks.are_many:
        return
    for name, level in plan.levels.items():
        if level.batches is None and plan.readings[name].is_random:
            raise ValueError(
                f"level {name!r}: its loss draws random numbers and has no data that ranks could "
                "share, so each rank would draw others. Give the level data, or draw from a "
                "generator with a seed of its own."
            )
    models = {f"parameters of the level {name!r}": one for name, one in plan.initial.items()}
    check_agreement(
        "LevelGraph", models, plan.ranks, "Seed every rank alike before the models are made."
    )
    batches = {f"data in the level {name!r}": data[name].peek(1) for name in _with_data(plan)}
    check_agreement(
        "LevelGraph",
        batches,
        plan.ranks,
        "Each rank takes its part of the same batch: shuffle with one seed on all ranks, and leave "
        "a `DistributedSampler` out.",
    )


def _with_data(plan: Plan) -> list[str]:
    return [name for name, level in plan.levels.items() if level.batches is not None]


def _make_turn(plan: Plan) -> Callable[[States, Rows], tuple[Scene, States]]:
    """Return a step of the whole graph, compiled if that is asked for and possible."""
    if not (plan.compile and plan.is_one_function):
        return partial(run_turn, plan, None, {}, step=step_top_level)

    def step_all(states: States, rows: Rows) -> tuple[Scene, States]:
        return run_turn(plan, None, {}, states, rows, step=step_top_level)

    return compile_whole(step_all)


def _make_first_state(plan: Plan, name: str) -> State:
    """Return a level's first state, with those of the levels that run inside its steps."""
    state, copies = plan.initial[name], plan.levels[name].copies
    if copies:
        state = tree.map(lambda leaf: leaf.expand(copies, *leaf.shape).clone(), state)
    inside = plan.timetable.members.get(name, ())
    return {**state, "below": {other: _make_first_state(plan, other) for other in inside}}


def _suggest_scale(levels: Mapping[str, Level]) -> str:
    """Return a sentence on the loss scales of levels in float16, "" where there are none."""
    halves = [level for level in levels.values() if level.precision is torch.float16]
    scales = ", ".join(f"{level.loss_scale!r} of {level.name!r}" for level in halves)
    if not halves:
        return ""
    return f"Or lower `loss_scale`, {scales}: in float16 derivatives end at 65504 / loss_scale."


def _raise_if_not_finite(states: States, step: int, remedy: str) -> None:
    """Raise `NonFiniteError` for a loss that is not finite, or the gradient of a top level.

    Args:
        states: after a step of the graph.
        step: its number; levels that make several count for themselves.
        remedy: see `NonFiniteError`.
    """
    for name, state in states.items():
        _raise_if_not_finite(state["below"], step, remedy)
        progress, where = state["progress"], f"level {name!r}"
        values: list[float] = progress["loss"].reshape(-1).tolist()
        first = find_not_finite(values)
        if first is not None:
            counted = "steps" in progress
            at = progress["steps"].reshape(-1).tolist()[first] - 1 if counted else step
            raise NonFiniteError(where, at, values[first], remedy=remedy)
        norm = state["metrics"].get("gradient norm")
        if norm is not None and not math.isfinite(norm.mean()):
            value = float(norm.mean())
            raise NonFiniteError(where, step, value, what="gradient norm", remedy=remedy)


def _find_metrics(states: States) -> dict[str, float | Tensor]:
    """Return the losses and metrics in these states, means over copies."""
    metrics: dict[str, float | Tensor] = {}
    for name, state in states.items():
        metrics |= _find_metrics(state["below"])
        found = {"loss": state["progress"]["loss"], **state["metrics"]}
        metrics |= {
            f"{name}/{key}": metric.mean() if metric.ndim else metric
            for key, metric in found.items()
        }
    return metrics
