"""Runs of an optimizer on many tasks at once, which nobody differentiates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from metaopt import tree
from metaopt._minimize import minimize
from metaopt.autodiff.replay import Ambient
from metaopt.meta_training.task import Task, TaskFamily
from metaopt.optimizer import Optimizer, begin, with_steps
from metaopt.tree import Tree

# A list of parameters -> the torch optimizer that trains them, of whatever library.
TorchOptimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
AnyOptimizer = Optimizer | TorchOptimizer


def run_tasks(
    optimizer: AnyOptimizer, family: TaskFamily, tasks: Task, noise: Ambient
) -> tuple[Tensor, Tree]:
    """Return (losses before each step [tasks, T], the parameters at the end, leaves [tasks, ...]).

    An optimizer that was made with `steps=None` is told T. What it says are the parameters to
    evaluate at is returned.

    Args:
        optimizer: an `Optimizer`, or a function from parameters to a torch optimizer.
        family: where the tasks are from.
        tasks: leaves [tasks, ...].
        noise: random numbers that losses draw.
    """
    with torch.no_grad(), noise.restored():
        if isinstance(optimizer, Optimizer):
            return _run_batched(optimizer, family, tasks)
        return _run_torch(optimizer, family, tasks)


def _run_batched(optimizer: Optimizer, family: TaskFamily, tasks: Task) -> tuple[Tensor, Tree]:
    horizon = tree.leaves(tasks.batches)[0].shape[1]
    told = with_steps(optimizer, horizon)

    def run(params: Tree, batches: Tree) -> tuple[Tensor, Tree]:
        params, state = begin(told, params)
        out = minimize(family.loss, told, params, batches, opt_state=state)
        return out.losses, told.evaluated(out.opt_state, out.params)

    found: tuple[Tensor, Tree] = vmap(run, randomness="different")(tasks.params, tasks.batches)
    return found


def _run_torch(make: TorchOptimizer, family: TaskFamily, tasks: Task) -> tuple[Tensor, Tree]:
    """Run a torch optimizer for each task, with gradients that are computed together."""
    params: Any = tree.map(torch.clone, tasks.params)
    leaves = tree.leaves(params)
    each = [[leaf[i] for leaf in leaves] for i in range(len(leaves[0]))]  # views, written in place
    optimizers = [make(views) for views in each]
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(
                "What is compared must be a metaopt Optimizer, or a function from a list of "
                f"parameters to a torch optimizer, got one that returns {type(one).__name__}. For "
                "example `lambda params: torch.optim.SGD(params, lr=0.1)`."
            )
    gradient = vmap(grad_and_value(family.loss), randomness="different")
    losses = []
    for t in range(tree.leaves(tasks.batches)[0].shape[1]):
        batch = tree.map(lambda leaf, t=t: leaf[:, t], tasks.batches)
        grads, loss = gradient(params, batch)
        losses.append(loss)
        rows = tree.leaves(grads)
        for i, (views, one) in enumerate(zip(each, optimizers, strict=True)):
            for view, row in zip(views, rows, strict=True):
                view.grad = row[i]
            _step(one)
    return torch.stack(losses, 1), params


def _step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except TypeError as error:
        raise TypeError(
            f"{type(optimizer).__name__} cannot be compared: its `step` wants more than gradients "
            f"({error}). Compare optimizers that make a step from one gradient."
        ) from error
