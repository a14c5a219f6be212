"""Running a graph forward: every function here is a pure function of tensors.

The total loss of a level, T(w) = L(w, levels above, responses of the levels below to w), is what
its optimizer minimises and what the rules differentiate. A response is an inner loop on the total
loss of the lower level: so levels nest.

`response` runs a response, by the rule of its edge. For the level whose gradient is taken, rules
record their pullbacks on a tape, which `backward` sweeps. Below that, where a total loss must
itself be a differentiable function because a rule above differentiates its gradient, rules attach
their pullbacks to their results, as in `minimize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params
from metaopt.differentiate import Inputs, PointRule, Rule
from metaopt.levels.facts import Move
from metaopt.levels.history import Record, Window, find_states, open_window
from metaopt.levels.plan import Plan
from metaopt.levels.response import Tape, respond
from metaopt.levels.scope import Rows, Scene
from metaopt.levels.state import (
    Memory,
    State,
    States,
    show,
    show_all,
)
from metaopt.levels.telling import each_copy, untold
from metaopt.levels.timetable import Owner

# (plan, level, scene, state, rows, window) -> state after a step of a top level
Step = Callable[[Plan, str, Scene, State, Rows, Window], State]

# Where a total loss is asked for. "steps": where a level steps; the levels below step, those that
# it shares have stepped. "end": where its steps ended, and levels below have made theirs: if their
# rule is a `PointRule`, they stay. "around": elsewhere, where those that it shares step again too.
Place = Literal["steps", "end", "around"]


def run_turn(
    plan: Plan,
    owner: Owner,
    scene: Scene,
    states: States,
    rows: Rows,
    *,
    at_point: bool = False,
    tape: Tape | None = None,
    step: Step | None = None,
) -> tuple[Scene, States]:
    """Run one turn of an owner: its levels step. Return (scene, states); see `Timetable`.

    Args:
        plan: of the graph.
        owner: a level, or None for the graph: then nothing is differentiated from outside.
        scene: what else these levels read.
        states: of the owner's levels.
        rows: batches of all that runs.
        at_point: if True, levels whose rule is a `PointRule` do not step.
        tape: the responses are appended to it. Without a tape, pullbacks are attached to results.
        step: makes a step of a top level, where the graph is the owner.
    """
    states, start = dict(states), states
    # The graph shows what runs inside these levels too: that is what is seen of it until they move.
    seen = show_all(states) if owner is None else {name: show(states[name]) for name in states}
    scene = {**scene, **seen}
    records: list[Record] = []
    for move in plan.moves.get(owner, ()):
        name, part = move.level, move.take(rows)
        # empty, and free, for a level that shares none
        window = open_window(plan, name, start, records)
        if step is not None and plan.is_top(name):
            state = states[name]
            # none of the levels it shares moves between these steps: one window is that of each
            for i in range(move.steps):
                state = step(plan, name, scene, state, _row(plan, name, part, i), window)
        else:
            state = respond(
                plan, move, total_loss, scene, states[name], part, window, at_point, tape
            )
        records.append(Record(name, move.steps, move.begins, scene, part, state))
        states[name] = state
        scene = {**scene, **_expose(plan, name, move.rule, scene, state, part, tape)}
    return scene, states


def total_loss(
    plan: Plan,
    name: str,
    place: Place,
    inputs: Inputs,
    params: Params,
    memory: Memory,
    rows: Rows,
) -> tuple[Tensor, dict[str, Any]]:
    """Return (T(w), {"buffers", "metrics", "below"} after the levels below have moved).

    Args:
        plan: of the graph.
        name: the level whose T it is.
        place: where w is, see `Place`.
        inputs: "meta" is (scene, window); "batch" has the batches, if every step sees the same.
        params: w.
        memory: the rest of the level's state.
        rows: otherwise, this step's batches.
    """
    scene, window = inputs["meta"]
    rows = rows if inputs["batch"] is None else inputs["batch"]
    scene = {**scene, name: {"params": params, "buffers": memory["buffers"]}}
    if window.records:
        with untold():
            scene = replay(plan, name, scene, window, place=place)
    below, at_point = memory["below"], place == "end"
    # The levels below see this one's parameters as they are here, so their responses are functions
    # of w, and T is L along all paths.
    if plan.copies_below[name] is not None:
        return _mean_of_copies(plan, name, at_point, scene, memory, rows)
    if below:
        scene, below = run_turn(plan, name, scene, below, rows, at_point=at_point)
    loss, after = plan.losses[name](scene, rows)
    return loss, {**after, "below": below}


def _mean_of_copies(
    plan: Plan, name: str, at_point: bool, scene: Scene, memory: Memory, rows: Rows
) -> tuple[Tensor, dict[str, Any]]:
    """Return what `total_loss` does, where the levels below are copies: the mean over them."""

    def one(scene: Scene, below: States, rows: Rows) -> tuple[Tensor, dict[str, Any]]:
        scene, below = run_turn(plan, name, scene, below, rows, at_point=at_point)
        loss, after = plan.losses[name](scene, rows)
        return loss, {**after, "below": below}

    # the axis `copies` of a batch comes after those of steps
    axes = {other: len(plan.leading_axes(other, name)) for other in rows}
    below = memory["below"]
    if name in plan.sequential_copies:
        results = [
            one(
                scene,
                tree.index(below, i),
                {
                    key: tree.map(lambda leaf, key=key, i=i: leaf.select(axes[key], i), row)
                    for key, row in rows.items()
                },
            )
            for i in each_copy(plan.copies_below[name] or 0)
        ]
        loss, after = tree.stack(results)
    else:
        # each copy has a dropout mask of its own, as if they ran one after the other
        each = torch.func.vmap(one, in_dims=(None, 0, axes), randomness="different")
        loss, after = each(scene, below, rows)
    metrics = tree.map(lambda metric: metric.mean(), after["metrics"])
    return loss.mean(), {
        "buffers": memory["buffers"],
        "metrics": metrics,
        "below": after["below"],
    }


def replay(
    plan: Plan,
    name: str,
    scene: Scene,
    window: Window,
    tape: Tape | None = None,
    *,
    place: Place = "steps",
) -> Scene:
    """Return the scene with the responses of the levels that `name` shares, as functions of it."""
    again = list(window.records[: window.old])
    states = find_states(window.start, again)
    # what later levels see, including levels inside; the recorded scenes hold those as constants
    moved: Scene = {}
    for record in window.records[window.old :]:
        lower, rule = record.level, plan.rule(name, record.level)
        stand = {other: show(state) for other, state in states.items()}
        seen = {**record.scene, **stand, **moved, name: scene[name]}
        its_window = open_window(plan, lower, window.start, again)
        # such a rule needs no steps again: it looks at where they ended
        is_point = isinstance(rule, PointRule) and place != "around"
        state = record.after if is_point else states[lower]
        move = Move(lower, record.steps, record.begins, rule)
        state = respond(
            plan, move, total_loss, seen, state, record.rows, its_window, is_point, tape
        )
        states[lower] = state
        moved = moved | _expose(plan, lower, rule, seen, state, record.rows, tape)
        again.append(record._replace(scene=seen, after=state))
    return {**scene, **moved}


def _expose(
    plan: Plan,
    name: str,
    rule: Rule | None,
    scene: Scene,
    state: State,
    rows: Rows,
    tape: Tape | None,
) -> Scene:
    """Return what others now read of a level, and of those inside its steps if they do."""
    # the levels inside have moved too, but what nobody outside reads need not be looked at
    if name not in plan.read_from_outside:
        return {name: show(state)}
    if not isinstance(rule, PointRule):
        return show_all({name: state})
    # levels inside respond to the end point; re-evaluate them there
    scene, last = {**scene, name: show(state)}, _row(plan, name, rows, -1)
    with untold():
        scene, _ = run_turn(plan, name, scene, state["below"], last, at_point=True, tape=tape)
    return {other: scene[other] for other in sorted(plan.timetable.inside[name] | {name})}


def _row(plan: Plan, name: str, rows: Rows, i: int) -> Rows:
    """Return the batches of one of the level's steps."""
    return rows if plan.timetable.steps[name] == 1 else tree.index(rows, i)
