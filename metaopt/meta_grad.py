"""Gradients of a task loss, averaged over a batch of tasks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad_and_value, vmap

from metaopt import tree
from metaopt.autodiff.gradient import gradient
from metaopt.batching import prefers_loop
from metaopt.compiled import compiled
from metaopt.functional import Params
from metaopt.kernels import any_order
from metaopt.minimize import check_finite
from metaopt.transforms import values_are_readable
from metaopt.tree import Tree


def meta_grad(
    task_loss: Callable[[Tree, Tree], Tensor], *, compile: bool = False, chunk_size: int | None = None
) -> Callable[[Tree, Tree], tuple[Tree, Tensor]]:
    """Return a function that computes g = 1/n sum_i grad_w L(w; task_i).

    Each task is differentiated by itself and the gradients are averaged: torch's derivative of an average over `vmap` is
    silently wrong for fused norm layers (see `any_order`, which also holds here).

    Args:
        task_loss: `task_loss(params, task)` returns a scalar; usually it calls `minimize`. Only `params` is differentiated, as
            by `torch.func.grad`: what else is to be learned, an inner learning rate for example, belongs into it.
        compile: compile the whole meta-gradient; see `compiled`. For small networks and few steps, which are all unrolled at
            compile time. Otherwise let `task_loss` call `minimize(..., compile=True)`, with `chunk_size=1`: five steps of a
            convolution network then took half a minute to compile, not three, and ran faster.
        chunk_size: how many tasks are batched by `vmap` at a time; 1 means a plain loop over tasks. By default all of them,
            or one on a CPU if the first call meets a convolution or more than 2^18 parameters: see `prefers_loop`.

    Returns:
        `meta_gradient(params, tasks) -> (grads, losses [n])`, where every leaf of `tasks` has the leading axis n. Both
        are detached at the top level; to differentiate them again, call it inside `torch.func.grad`.

    Raises:
        ValueError: there are no tasks, or their leading axes differ.
        NonFiniteError: a task's loss is not finite.

    Cost:
        `chunk_size` times the memory of one task, and as many copies of the parameters.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"`chunk_size` must be a positive integer or None, got {chunk_size}.")

    # The context inside, for a compiled function then has it only while it is traced.
    def one(params: Tree, task: Tree) -> tuple[Tree, Tensor]:
        with any_order():
            grads, loss, _ = gradient(lambda at: (task_loss(at, task), ()), params)
        return grads, loss

    def many(params: Tree, tasks: Tree) -> tuple[Tree, Tensor]:
        # vmap has no channels-last layout; `contiguous()` would leave a weight with one channel as it is
        params = tree.map(lambda param: param.clone(memory_format=torch.contiguous_format), params)
        with any_order():
            grads, losses = vmap(grad_and_value(task_loss), in_dims=(None, 0), randomness="different")(params, tasks)
        return tree.map(lambda g: g.mean(0), grads), losses

    run_one, run_many = (compiled(one), compiled(many)) if compile else (one, many)
    loops: bool | None = None  # what the first call found to be faster

    def meta_gradient(params: Tree, tasks: Tree) -> tuple[Tree, Tensor]:
        nonlocal loops
        count = _count(tasks)
        outermost = values_are_readable()
        if outermost:
            params = tree.map(torch.Tensor.detach, params)
        total, losses = None, []
        # Without gradients at the top level, autograd would record the whole computation once more.
        with torch.set_grad_enabled(not outermost):
            if loops is None and chunk_size is None and count > 1 and not torch.compiler.is_compiling():
                loops = prefers_loop(many, params, tree.index(tasks, slice(2)))
            chunk = chunk_size or (1 if loops else count)
            for start in range(0, count, chunk):
                if chunk == 1:
                    grads, loss = run_one(params, tree.index(tasks, start))
                    loss = loss[None]
                else:
                    some = tasks if chunk >= count else tree.index(tasks, slice(start, start + chunk))
                    grads, loss = run_many(params, some)
                total = _plus(total, grads, len(loss) / count)
                losses.append(loss)
        all_losses = losses[0] if len(losses) == 1 else torch.cat(losses)
        if outermost:
            check_finite(all_losses, "meta_grad", unit="task")
        return total, all_losses

    return meta_gradient


def assign_grads(model: nn.Module, grads: Params) -> None:
    """Write `grads` into the `.grad` of the model's parameters, for any `torch.optim` optimizer to use.

    Raises:
        ValueError: a name is not a parameter of the model, a trainable parameter is missing, or a shape differs.
    """
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if trainable.keys() != grads.keys():
        missing, unknown = sorted(trainable.keys() - grads.keys()), sorted(grads.keys() - trainable.keys())
        raise ValueError(f"`grads` must name the model's trainable parameters; missing {missing}, unknown {unknown}.")
    for name, parameter in trainable.items():
        if parameter.shape != grads[name].shape:
            raise ValueError(f"`grads[{name!r}]` must have shape {tuple(parameter.shape)}, got {tuple(grads[name].shape)}.")
        parameter.grad = grads[name].detach().clone()


def _plus(total: Tree | None, grads: Tree, share: float) -> Tree:
    """Return total + share grads, where None is zero."""
    if total is not None:
        return tree.map(lambda total, g: tree.scaled_sum(total, share, g), total, grads)
    return grads if share == 1 else tree.map(lambda g: share * g, grads)


def _count(tasks: Tree) -> int:
    count = tree.leading_axis(tasks)
    if not count:
        raise ValueError(
            "Every leaf of `tasks` must have the number of tasks (at least 1) as its leading axis, got "
            f"{tree.leading_axes(tasks)} (-1: none). Stack the tasks first."
        )
    return count
