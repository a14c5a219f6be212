"""The gradient of a level's total loss: forward on a tape, backward along it.

    forward:  every level below responds: (level, where it ended, scene, pullback) goes on the tape
    slopes =  gradient of the level's own loss in its own parameters and in every response
    for response in reversed(tape):
        for level, cotangent in response.pullback(slopes.pop(response.level)):
            slopes[level] += cotangent
    return slopes[self]

This holds where every rule below looks at one point, and nothing responds inside of a response
(`Plan.responds_at_points`). A whole step is then free of functions whose derivative only we know,
and can be compiled. Elsewhere the responses are attached to their results, and autograd makes the
same sweep over the graph of the total loss: rules that differentiate the steps have that graph as
their pullback, and copies are batched by `vmap`, out of which no tape can be handed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from metaopt._functional import Params
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.pullback import plus
from metaopt.differentiate import Given, Result
from metaopt.differentiate.statistics import name_owner
from metaopt.levels.forward import Place, replay, run_turn, total_loss
from metaopt.levels.history import Window, make_inputs
from metaopt.levels.plan import Plan
from metaopt.levels.response import Response, Tape
from metaopt.levels.scope import After, Rows, Scene
from metaopt.levels.state import State, show, without_params

Slope = dict[str, Tensor | None]  # parameter -> derivative in it; None is zero


def take_total_gradient(
    plan: Plan,
    name: str,
    scene: Scene,
    state: State,
    rows: Rows,
    window: Window,
    *,
    at_point: bool = False,
) -> tuple[Params, Tensor, dict[str, Any]]:
    """Return (dT/dw, T, what `total_loss` returns beside T), all constant.

    Args:
        plan: of the graph.
        name: the level whose total loss T is differentiated.
        scene: what the level sees of the others.
        state: the level's state.
        rows: batches of the level's step and of all that runs inside it.
        window: what happened to the levels that it shares.
        at_point: if True, levels whose rule is a `PointRule` do not step.
    """
    if not plan.responds_at_points(name):
        return _differentiate_by_autograd(plan, name, scene, state, rows, window, at_point)

    # forward, with constants alone: every level below responds
    tape: Tape = []
    scene = {**scene, name: show(state)}
    if window.records:
        scene = replay(plan, name, scene, window, tape)
    scene, below = run_turn(plan, name, scene, state["below"], rows, at_point=at_point, tape=tape)

    # the gradient of the level's own loss in all that moves with its parameters
    def value(variables: dict[str, Params]) -> tuple[Tensor, After]:
        moved: Scene = {
            level: {"params": params, "buffers": scene[level]["buffers"]}
            for level, params in variables.items()
        }
        return plan.losses[name]({**scene, **moved}, rows)

    variables = {name: state["params"]}
    variables |= {
        response.level: response.params
        for response in tape
        if response.level in plan.readings[name].levels
    }
    slopes, loss, aux = _differentiate(value, variables)

    # and backward, along the tape
    slope = sweep(tape, slopes, name)
    return _fill_missing(plan, name, slope, state["params"]), loss, {**aux, "below": below}


def _differentiate_by_autograd(
    plan: Plan, name: str, scene: Scene, state: State, rows: Rows, window: Window, at_point: bool
) -> tuple[Params, Tensor, dict[str, Any]]:
    """Return what `take_total_gradient` does, by autograd through T as one function."""
    memory = without_params(state)
    inputs = make_inputs(scene, window, rows)

    def value(variables: dict[str, Params]) -> tuple[Tensor, dict[str, Any]]:
        place: Place = "end" if at_point else "steps"
        return total_loss(plan, name, place, inputs, variables[name], memory, rows)

    slopes, loss, aux = _differentiate(value, {name: state["params"]})
    return _fill_missing(plan, name, slopes[name], state["params"]), loss, aux


def _differentiate(
    value: Callable[[dict[str, Params]], tuple[Tensor, Any]], variables: dict[str, Params]
) -> tuple[dict[str, Slope], Tensor, Any]:
    # A compiler does not see what a value depends on: there a derivative that does not arrive is
    # zero, and not missed.
    return gradient(value, variables, allow_unused=not torch.compiler.is_compiling())


def sweep(tape: Sequence[Response], slopes: Mapping[str, Slope], root: str) -> Slope:
    """Return the total derivative in the parameters of `root`: the direct one and the responses'.

    Args:
        tape: the responses in the order of time. Each reads `root`, and of the other levels what
            the last response before it left.
        slopes: level -> derivative in the parameters that its last response left, and of `root` in
            its own.
        root: the level above all of them.

    Cost:
        One pullback of every response that matters, however many paths lead to it.
    """
    total, moving = dict(slopes), {root} | {response.level for response in tape}
    for response in reversed(tape):
        # All that reads this response comes later on the tape: its slope is complete. What is added
        # to the level from here on belongs to the response before it.
        slope = total.pop(response.level, {})
        if any(part is not None for part in slope.values()):
            name_owner(response.level)
            for level, bars in _pull_back(response, slope, moving).items():
                before = total.get(level, {})
                total[level] = {key: plus(bar, before.get(key)) for key, bar in bars.items()}
    return total[root]


def _pull_back(response: Response, slope: Slope, moving: set[str]) -> dict[str, Slope]:
    """Return level -> cotangent of its parameters, for the levels that move among those it sees."""
    # in_...: whether its cotangent is wanted; to_...: its cotangent
    in_scene = {level: {"params": level in moving, "buffers": False} for level in response.scene}
    if not moving & in_scene.keys():
        return {}
    inputs: Any = {"optimizer": False, "loss": False, "meta": (in_scene, False), "batch": False}
    cotangents = Result({key: slope.get(key) for key in response.params}, None, None)
    to_scene, _ = response.pullback(cotangents, Given(inputs, False, False, False)).inputs["meta"]
    found = {level: to_scene[level]["params"] for level in response.scene if level in moving}
    return {level: bars for level, bars in found.items() if bars is not None}


def _fill_missing(plan: Plan, level: str, slope: Slope, params: Params) -> Params:
    """Return the gradients, zeros for those that may be missing."""
    found: Params = {}
    for key, grad in slope.items():
        if grad is None and not plan.levels[level].allow_unused:
            raise ValueError(
                f"level {level!r}: no derivative arrives at its parameter {key!r}: neither its "
                f"loss nor a response below depends on it. If that is meant, pass "
                "`allow_unused=True`."
            )
        found[key] = torch.zeros_like(params[key]) if grad is None else grad
    return found
