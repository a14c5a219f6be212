"""How a level responds: its steps are an inner loop, and the rule of its edge runs it.

Which rule that is says `facts.find_rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from metaopt._functional import Params
from metaopt.differentiate import InnerLoop, PointRule, Pullback
from metaopt.differentiate.steps import run
from metaopt.levels.facts import Move
from metaopt.levels.history import Window, make_inputs
from metaopt.levels.plan import Plan
from metaopt.levels.scope import Rows, Scene
from metaopt.levels.state import (
    Memory,
    State,
    begin,
    find_optimizer_tensors,
    find_rate,
    precondition,
    update,
    without_params,
)
from metaopt.transforms import is_unrecorded, values_are_readable

# (plan, level, place, inputs, params, memory, rows) -> (T, the rest of the state afterwards)
TotalLoss = Callable[..., tuple[Tensor, dict[str, Any]]]


class Response(NamedTuple):
    """What a level did, for the way back.

    Attributes:
        level: its name.
        params: where its steps ended.
        scene: what it read.
        pullback: that of its rule.
    """

    level: str
    params: Params
    scene: Scene
    pullback: Pullback


Tape = list[Response]


def respond(
    plan: Plan,
    move: Move,
    total_loss: TotalLoss,
    scene: Scene,
    state: State,
    rows: Rows,
    window: Window,
    at_point: bool,
    tape: Tape | None,
) -> State:
    """Return the state of a level after its steps, differentiable as the rule of the move says.

    Args:
        plan: of the graph.
        move: the steps, and their rule.
        total_loss: what the steps minimise; an argument, since that function calls this one.
        scene: what the level reads of the others.
        state: the level's state before the steps.
        rows: batches of the steps.
        window: what happened to the levels that it shares.
        at_point: if True, a level whose rule is a `PointRule` does not step.
        tape: gets the response. Without a tape, the pullback is attached to the result.
    """
    name, rule = move.level, move.rule
    # A loop of no steps ends where it starts, and a rule that looks at one point looks there. Rules
    # that differentiate the steps have nothing to look at without them, and make them.
    stays = at_point and isinstance(rule, PointRule)
    if move.begins and not stays:
        state = begin(plan, name, scene, state)
    # with a tape it is the graph's own step: when all is well, it makes what was tried
    tries = tape is not None and name in plan.tried and is_unrecorded()
    steps = 0 if stays else move.steps
    loop = make_loop(plan, name, total_loss, steps, scene, state, rows, window, tries=tries)
    if rule is None:
        result = run(loop)
    elif tape is None:
        result = rule.attach(loop)
    else:
        result, pullback = rule.vjp(loop)
        tape.append(Response(name, result.params, loop.inputs["meta"][0], pullback))
    memory: Memory = result.state
    return {"params": result.params, **memory}


def make_loop(
    plan: Plan,
    name: str,
    total_loss: TotalLoss,
    steps: int,
    scene: Scene,
    state: State,
    rows: Rows,
    window: Window,
    *,
    tries: bool = False,
) -> InnerLoop:
    """Return the steps of a level as an inner loop, whose `meta` is all that they read.

    If it `tries`, the optimizer's state after them may be a `Trial`.
    """
    level, is_one = plan.levels[name], plan.timetable.steps[name] == 1
    has_below = bool(plan.timetable.members.get(name))
    return InnerLoop(
        loss=partial(total_loss, plan, name, "steps"),
        update=partial(update, level, tries=tries),
        inputs=make_inputs(
            {other: scene[other] for other in plan.reads_outside[name]},
            window,
            # the rows of a level that makes one step in a turn have no axis for steps
            rows if is_one else None,
            find_optimizer_tensors(plan, name, scene),
        ),
        params=state["params"],
        state=without_params(state),
        batches=() if is_one else rows,
        steps=steps,
        compile=plan.compiles(name) and values_are_readable(),
        rate=partial(find_rate, level),
        # in its warmup a level does not move by its optimizer's updates
        precondition=None if level.warmup else partial(precondition, level),
        # where its steps ended, the levels below have made theirs
        loss_at_end=partial(total_loss, plan, name, "end") if has_below else None,
        # elsewhere, those that it shares would have moved in another way
        loss_around=partial(total_loss, plan, name, "around") if window.records else None,
        is_random=name in plan.random,
    )
