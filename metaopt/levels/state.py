"""The state of a level: what it starts from, how others see it, and how its optimizer moves it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params, lend
from metaopt.differentiate import Inputs
from metaopt.levels.level import Level
from metaopt.levels.plan import Plan
from metaopt.levels.reading import Reading
from metaopt.levels.scope import Scene, Shown
from metaopt.levels.telling import tell_step
from metaopt.optimizer import Observe
from metaopt.optimizer.by_name import Value
from metaopt.optimizer.trial import Trial, try_step
from metaopt.transforms import constant


class Memory(TypedDict):
    """A level's state without its parameters: what an `InnerLoop` calls its state.

    Attributes:
        optimizer: state of the optimizer.
        buffers: of the model.
        metrics: scalars that the last step returned to be logged.
        progress: the last loss, and the number of steps where it is counted.
        below: the states of the levels that run inside this one's steps.
    """

    optimizer: Any
    buffers: Params
    metrics: dict[str, Tensor]
    progress: dict[str, Tensor]
    below: dict[str, Any]


class State(Memory):
    """A level's state. In a dict its parameters come first: trees are flattened in that order."""

    params: Params


States = dict[str, State]  # level -> its state


def show(state: State) -> Shown:
    """Return the part of a level's state that others can read."""
    return {"params": state["params"], "buffers": state["buffers"]}


def show_all(states: Mapping[str, State]) -> Scene:
    """Return what others can read of these levels, and of the ones inside their steps."""
    scene: Scene = {}
    for name, state in states.items():
        scene |= {name: show(state)} | show_all(state["below"])
    return scene


def without_params(state: State) -> Memory:
    """Return a level's state without its parameters."""
    return {key: value for key, value in state.items() if key != "params"}  # type: ignore[return-value]


def make_initial_state(level: Level, reading: Reading, *, is_top: bool, steps: int) -> State:
    """Return the state of a level by itself before its first step, structured as after one.

    Args:
        level: the level.
        reading: what its loss depends on.
        is_top: whether no level is above.
        steps: number of its steps in one step of the graph; counted only if above 1.
    """
    params = {key: param.detach().clone() for key, param in level.net.params.items()}
    like = next(iter(params.values()))
    zero = torch.zeros((), device=like.device, dtype=torch.int64)
    metrics = {**reading.metrics, **({"gradient norm": tree.norm(params).dtype} if is_top else {})}
    return {
        "params": params,
        "optimizer": tree.map(lambda leaf: leaf.detach().clone(), level.optimizer.init(params)),
        "buffers": {key: buffer.clone() for key, buffer in level.net.buffers.items()},
        "metrics": {
            name: torch.zeros((), device=like.device, dtype=dtype)
            for name, dtype in metrics.items()
        },
        "progress": {
            "loss": torch.zeros((), device=like.device, dtype=reading.dtype),
            **({"steps": zero} if steps > 1 or level.warmup else {}),
        },
        "below": {},
    }


def begin(plan: Plan, name: str, scene: Scene, state: State) -> State:
    """Return the state in which a level begins its steps, as the edge above it says."""
    edge = plan.starts[name]
    if edge is None:
        return state
    initial = plan.initial[name]
    # The upper level's parameters themselves, no copy: through them a rule that differentiates the
    # steps reaches that level, as in MAML.
    params = initial["params"] if edge.start == "restart" else scene[edge.upper.name]["params"]
    memory = plan.levels[name].optimizer.init(params)
    # under vmap each copy needs buffers of its own, to be updated in place
    buffers = tree.map(
        lambda now, first: torch.zeros_like(now) + first, state["buffers"], initial["buffers"]
    )
    return {**state, "params": params, "optimizer": memory, "buffers": buffers}


def find_optimizer_tensors(plan: Plan, name: str, scene: Scene) -> dict[str, Tensor]:
    """Return the tensors of a level's optimizer; {} if all are constant.

    Those that a level above owns are as the scene has them.
    """
    if name not in plan.adjustable:
        return {}
    optimizer, links = plan.levels[name].optimizer, plan.links[name]
    own = dict(optimizer.named_parameters()) | dict(optimizer.named_buffers())
    if not links and not any(tensor.requires_grad for tensor in own.values()):
        return {}
    # a level above learns these: it is through the scene that its derivative comes
    linked = {tensor: scene[level]["params"][param] for tensor, (level, param) in links.items()}
    return {key: tensor.detach() for key, tensor in own.items()} | linked


def update(
    level: Level,
    inputs: Inputs,
    grads: Params,
    memory: Memory,
    params: Params,
    loss: Tensor,
    aux: dict[str, Any],
    *,
    tries: bool = False,
) -> tuple[Params, Memory]:
    """Return (parameters, rest of the state) after one application of the level's optimizer.

    Args:
        level: the level.
        inputs: "optimizer" has the optimizer's tensors, {} for its own.
        grads: like the parameters.
        memory: the rest of the state before.
        params: at which the gradients were taken.
        loss: the loss there.
        aux: those parts of the rest that evaluating the loss has changed.
        tries: whether the optimizer's state may be a `Trial`, where the step is large.
    """
    before, move = memory["optimizer"], level.optimizer.moved
    tensors = inputs["optimizer"]
    trial = None
    if tries:
        given = level.optimizer, grads, before, params, loss
        trial = lend(level.optimizer, tensors, try_step, *given)
    if trial is not None:
        moved = trial.params, trial
    elif tensors:
        moved = lend(level.optimizer, tensors, move, grads, before, params, loss=loss)
    else:
        moved = move(grads, before, params, loss=loss)
    if level.warmup:
        # by `where`, since under a transform or a compiler the count cannot decide
        moves = memory["progress"]["steps"] >= level.warmup
        moved = tree.map(lambda new, old: torch.where(moves, new, old), moved, (params, before))
    after, optimizer = moved
    new = {**aux, "optimizer": optimizer, "progress": _count(memory["progress"], loss)}
    tell_step(level.name, loss, aux["metrics"])
    # in the same order, by which trees are flattened
    return after, {key: new[key] for key in memory}  # type: ignore[return-value]


@torch.no_grad()
def make_tried_steps(states: States) -> States:
    """Make the steps that were only tried, in place; return the states after them."""
    made: States = {}
    for name, state in states.items():
        after: State = {**state, "below": make_tried_steps(state["below"])}
        if isinstance(state["optimizer"], Trial):
            trial = state["optimizer"]
            after |= {"optimizer": trial.make(), "params": trial.before}
        made[name] = after
    return made


def find_rate(
    level: Level, inputs: Inputs, memory: Memory, params: Params, observe: Observe
) -> Value:
    """Return the step size that the level's optimizer would use next, an `InnerLoop`'s rate."""
    optimizer = level.optimizer
    tensors, before = inputs["optimizer"], memory["optimizer"]
    return lend(optimizer, tensors, optimizer.rate, before, params, observe)  # type: ignore[no-any-return]


def precondition(
    level: Level,
    inputs: Inputs,
    v: Params,
    grads: Params,
    memory: Memory,
    params: Params,
    loss: Tensor,
) -> Params:
    """Return what the derivative of the optimizer's update makes of v."""
    optimizer, before = level.optimizer, memory["optimizer"]
    apply = optimizer.precondition
    return lend(optimizer, inputs["optimizer"], apply, v, grads, before, params, loss=loss)  # type: ignore[no-any-return]


def find_values(level: Level, state: State) -> dict[str, float | Tensor]:
    """Return the values of the hyperparameters in the next step; of copies their mean."""
    seen = {
        "optimizer": state["optimizer"],
        "progress": state["progress"],
        "params": state["params"],
    }
    copies = [seen] if level.copies is None else [tree.index(seen, i) for i in range(level.copies)]
    each = [
        tree.map(
            constant,
            level.optimizer.values(
                one["optimizer"], loss=one["progress"]["loss"], params=one["params"]
            ),
        )
        for one in copies
    ]
    return {key: sum(values[key] for values in each) / len(each) for key in each[0]}


def _count(progress: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    """Keep the loss; of several steps count them, up to the first loss that is not finite."""
    if "steps" not in progress:
        return {"loss": loss.detach()}
    kept = progress["loss"]
    goes_on = kept.abs() < math.inf  # false for nan too
    return {
        "loss": torch.where(goes_on, loss.detach().to(kept.dtype), kept),
        "steps": progress["steps"] + goes_on,
    }
