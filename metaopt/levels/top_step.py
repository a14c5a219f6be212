"""One step of a top level, which nobody differentiates: with gradients off."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from metaopt import tree
from metaopt.levels.backward import take_total_gradient
from metaopt.levels.forward import run_turn, total_loss
from metaopt.levels.history import Window, make_inputs
from metaopt.levels.plan import Plan
from metaopt.levels.scope import Rows, Scene
from metaopt.levels.state import State, find_optimizer_tensors, update, without_params
from metaopt.levels.telling import untold
from metaopt.optimizer import Optimizer


def step_top_level(
    plan: Plan, name: str, scene: Scene, state: State, rows: Rows, window: Window
) -> State:
    """Return the state of a top level after one step, and of all that runs inside it."""
    level, memory = plan.levels[name], without_params(state)
    ahead, there = begin_virtual_steps(plan, name, state)
    inputs = make_inputs(scene, window, rows, find_optimizer_tensors(plan, name, scene))
    looks_ahead = any(edge.look_ahead for edge in plan.lowers[name])
    waits = (
        level.warmup
        and not torch.compiler.is_compiling()
        and int(state["progress"]["steps"]) < level.warmup
    )
    with untold() if looks_ahead else nullcontext():
        # without a gradient, but with the loss: its levels below move all the same
        if waits:
            others = without_params(there)
            loss, aux = total_loss(ahead, name, "steps", inputs, state["params"], others, rows)
            grads = tree.map(torch.zeros_like, state["params"])
        else:
            grads, loss, aux = take_total_gradient(ahead, name, scene, there, rows, window)
    aux["metrics"] = {**aux["metrics"], "gradient norm": tree.norm(grads)}
    params, after = update(level, inputs, grads, memory, state["params"], loss, aux)
    # the steps above were for the gradient alone: those that count see the new parameters
    if looks_ahead:
        moved: Scene = {**scene, name: {"params": params, "buffers": memory["buffers"]}}
        _, after["below"] = run_turn(plan, name, moved, memory["below"], rows)
    return {"params": params, **after}


def begin_virtual_steps(plan: Plan, name: str, state: State) -> tuple[Plan, State]:
    """Return the plan and the state with which to take the hypergradient of a top level.

    They differ from the given ones if an edge has an optimizer for virtual steps: that begins
    afresh, from where the lower level stands.
    """
    if plan.virtual is None:
        return plan, state
    below = dict(state["below"])
    for edge in plan.lowers[name]:
        if isinstance(edge.look_ahead, Optimizer):
            lower = below[edge.lower.name]
            memory = edge.look_ahead.init(lower["params"])
            below[edge.lower.name] = {**lower, "optimizer": memory}
    return plan.virtual, {**state, "below": below}
