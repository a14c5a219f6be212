"""What a level starts from, and one application of its optimizer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Params, lent
from metaopt.levels.level import Level
from metaopt.levels.program import Program
from metaopt.levels.reading import Reading
from metaopt.optimizer import Observe
from metaopt.optimizer.hyperparameter import Value
from metaopt.transforms import constant
from metaopt.tree import Tree


def initial_state(level: Level, reading: Reading, *, is_top: bool, steps: int) -> Tree:
    """Return the state of a level by itself before its first step, in the structure that it has
    after one.

    Args:
        level: whose.
        reading: what its loss depends on.
        is_top: whether no level is above.
        steps: that it makes in one step of the graph. One alone is not counted: the graph counts
            its own.
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


def begun(program: Program, name: str, scene: Tree, state: Tree) -> Tree:
    """Return the state in which a level begins its steps for the level above, as their edge says."""
    edge = program.starts[name]
    if edge is None:
        return state
    initial = program.initial[name]
    params = initial["params"] if edge.start == "restart" else scene[edge.upper.name]["params"]
    memory = program.levels[name].optimizer.init(params)
    # under vmap each copy needs buffers of its own, to be updated in place
    buffers = tree.map(
        lambda now, first: torch.zeros_like(now) + first, state["buffers"], initial["buffers"]
    )
    return {**state, "params": params, "optimizer": memory, "buffers": buffers}


def optimizer_tensors(program: Program, name: str, scene: Tree) -> dict[str, Tensor]:
    """Return the tensors of a level's optimizer, those that a level above owns as the scene has
    them; {} if all are constant.
    """
    if name not in program.adjustable:
        return {}
    optimizer, links = program.levels[name].optimizer, program.links[name]
    own = dict(optimizer.named_parameters()) | dict(optimizer.named_buffers())
    if not links and not any(tensor.requires_grad for tensor in own.values()):
        return {}
    linked = {tensor: scene[level]["params"][param] for tensor, (level, param) in links.items()}
    return {key: tensor.detach() for key, tensor in own.items()} | linked


def update(
    level: Level,
    inputs: dict[str, Tree],
    grads: Tree,
    others: Tree,
    params: Params,
    loss: Tensor,
    aux: Tree,
) -> tuple[Params, Tree]:
    """Return (parameters, rest of the state) after one application of the level's optimizer, an
    `InnerLoop`'s update.

    Args:
        level: whose.
        inputs: "optimizer" has the optimizer's tensors, {} for its own.
        grads: like the parameters.
        others: the rest of the state before.
        params: at which the gradients were taken.
        loss: the loss there.
        aux: those parts of the rest that evaluating the loss has changed.
    """
    memory, progress = others["optimizer"], others["progress"]
    if inputs["optimizer"]:
        optimizer = level.optimizer
        after, memory = lent(
            optimizer, inputs["optimizer"], optimizer.moved, grads, memory, params, loss=loss
        )
    else:
        after, memory = level.optimizer.moved(grads, memory, params, loss=loss)
    if level.warmup:
        moves = progress["steps"] >= level.warmup
        after, memory = tree.map(
            lambda new, old: torch.where(moves, new, old),
            (after, memory),
            (params, others["optimizer"]),
        )
    new = {**aux, "optimizer": memory, "progress": _counted(progress, loss)}
    # in the same order, by which trees are flattened
    return after, {key: new[key] for key in others}


def rate(
    level: Level, inputs: dict[str, Tree], others: Tree, params: Params, observe: Observe
) -> Value:
    """Return the step size that the level's optimizer would use next, an `InnerLoop`'s rate."""
    optimizer = level.optimizer
    return lent(
        optimizer, inputs["optimizer"], optimizer.rate, others["optimizer"], params, observe
    )  # type: ignore[no-any-return]


def values_of(level: Level, state: Tree) -> dict[str, float | Tensor]:
    """Return the values of the optimizer's hyperparameters in the next step from a state; of copies
    their mean.
    """
    seen = {key: state[key] for key in ("optimizer", "progress", "params")}
    each = [
        tree.map(
            constant,
            level.optimizer.values(
                one["optimizer"], loss=one["progress"]["loss"], params=one["params"]
            ),
        )
        for one in (
            [seen] if level.copies is None else [tree.index(seen, i) for i in range(level.copies)]
        )
    ]
    return {key: sum(values[key] for values in each) / len(each) for key in each[0]}


def _counted(progress: Tree, loss: Tensor) -> Tree:
    """Keep the loss; of several steps, count them, and keep their last loss up to the first one
    that is not finite.
    """
    if "steps" not in progress:
        return {"loss": loss.detach()}
    kept = progress["loss"]
    goes_on = kept.abs() < math.inf  # false for nan too
    return {
        "loss": torch.where(goes_on, loss.detach().to(kept.dtype), kept),
        "steps": progress["steps"] + goes_on,
    }
