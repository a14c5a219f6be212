"""The inner loop: a loss, an optimizer, and how gradients pass through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt._functional import Functional
from metaopt.batching import widen
from metaopt.checks import check_finite
from metaopt.closure import OF_OPTIMIZER, check_closure
from metaopt.differentiate import Backprop, InnerLoop, Inputs, Rule
from metaopt.differentiate.point import read_by_loss
from metaopt.differentiate.refusal import attach_refusal, refuse_zeros
from metaopt.inner_problem import InnerProblem, Unused
from metaopt.optimizer import Optimizer, Schedule, State
from metaopt.scan.rows import explain_first_row, rows_of
from metaopt.scan.stream import first_row
from metaopt.transforms import constant, is_tracked, values_are_readable
from metaopt.tree import Tree

OURS = ("metaopt.", "optimizers.", "torch.")  # whose optimizers reach nothing but what is theirs


class Minimized(NamedTuple):
    """What `minimize` returns.

    Attributes:
        params: the last parameters.
        opt_state: the last state of the optimizer.
        losses: the loss before each step, [steps].
        aux: what the loss returned beside its value at each step, leaves [steps, ...]; () without.
        buffers: the last buffers; () without.
        observed: what `observe` returned after each step, leaves [steps, ...]; () without.
    """

    params: Tree
    opt_state: State
    losses: Tensor
    aux: Tree = ()
    buffers: Tree = ()
    observed: Tree = ()


def minimize(
    loss_fn: Callable[..., Any],
    optimizer: Optimizer,
    params: Tree,
    batches: Tree,
    *,
    steps: int | None = None,
    meta: Tree = None,
    buffers: Tree = None,
    opt_state: State | None = None,
    observe: Callable[..., Tree] | None = None,
    differentiate: Rule = Backprop(),  # noqa: B008
    unused: Unused = "zero",
    compile: bool = False,
) -> Minimized:
    """Run T steps of an optimizer and return w_T, s_T and [L(w_0), ..., L(w_{T-1})].

    A step is w_{t+1} = w_t + u(grad L(w_t, batch_t), s_t, w_t).

    The result is differentiable in the initial parameters, the optimizer's parameters and tensors,
    `meta`, `buffers`, a given `opt_state` and floating-point batches, in the way that
    `differentiate` says. Nothing is changed in place.

    Args:
        loss_fn: `loss_fn(params, batch)`, or `loss_fn(params, batch, meta)` if `meta` is given,
            returns a scalar, or (a scalar, aux) with a tree of tensors. If `buffers` are given, it
            also gets `buffers=` by name, and returns (a scalar, the next buffers) or (a scalar, the
            next buffers, aux). If it is an `nn.Module`, its trainable parameters are differentiated
            too; its own buffers stay as they are.
        optimizer: any `Optimizer`.
        params: initial parameters, a tree of floating-point tensors.
        batches: with `steps`, the one batch that every step sees (or None); without, a tree whose
            leaves all have time as their leading axis, one row a step. Or a list of batches, or an
            iterator (a generator, a DataLoader) that yields the batch of each step when it comes to
            it; the loop ends when it does. Except for "full", and where no gradients are enabled,
            all batches of an iterator are kept until the backward pass has run.
        steps: number of steps T.
        meta: what the outer level owns, a tree of tensors.
        buffers: what the loss reads and changes from step to step, a tree of tensors: running
            statistics, for example `functional(model).buffers` for `with_buffers`. (Those of batch
            norm are constants, as in torch.)
        opt_state: state to go on from; by default `optimizer.init(params)`.
        observe: called after each step as `loss_fn` is, with the parameters and buffers then and
            the batch of that step; returns a tree of tensors. `(weights * out.observed).sum()` is a
            loss over the whole loop.
        differentiate: how gradients pass through the loop: `Backprop()`, `FirstOrder()`, ...
        unused: what happens to a parameter that the loss of a step does not depend on. "zero": its
            gradient is zero, so weight decay and momentum still move it. "skip": it stays, its
            memory stays, and the step does not count for it, as in `torch.optim` where `.grad` is
            None. (What a loop inside the loss is given counts as used, unless its memory is
            "full".)
        compile: compile one step and its derivative, for any number of steps; see `compile_whole`.
            Inside another compiled function this changes nothing: there the loop is unrolled.

    Raises:
        ValueError: the batches' leading axes differ, `steps` is missing, the loss returns something
            else, or `loss_fn` reaches a tensor that requires grad through its closure; or `compile`
            inside a transform of `torch.func`. On the way back: a step that is made again is not
            the step that was taken.
        NonFiniteError: a loss is not finite. (Inside `vmap`, `grad` or a compiled function values
            cannot be read; there the value is passed on as it is.)

    Cost:
        That of the rule, and one forward pass of the loss (and of `observe`) that looks for
        closures while gradients are enabled.
        `observe`: one forward pass a step more. "skip": each parameter is updated by itself.
    """
    _check_arguments(optimizer, params, differentiate, unused, compile)
    xs, constant, length = rows_of(batches, steps)
    has_buffers = buffers is not None
    problem = InnerProblem(
        loss_fn,
        optimizer,
        observe,
        same_batch=steps is not None,
        has_meta=meta is not None,
        has_buffers=has_buffers,
    )
    inputs = problem.inputs(meta, constant)
    state = optimizer.init(params) if opt_state is None else opt_state
    if unused == "skip":
        state = optimizer.separate(state, params)
    if has_buffers:
        if not values_are_readable():
            buffers = widen(buffers, (params, inputs, first_row(xs)))
        state = {"optimizer": state, "buffers": buffers}
    skips = unused == "skip"
    loop = problem.make_loop(inputs, params, state, xs, length, compile=compile, skips=skips)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_closure(problem, loop, batches, steps)
    ignored, read_by_rule = differentiate.ignored(loop), read_by_loss(inputs)
    refuse_zeros(differentiate, ignored, read_by_rule)
    after, last, emitted = differentiate.attach(loop)
    if ignored:
        after = attach_refusal(differentiate, after, ignored, read_by_rule)
    emitted = emitted if isinstance(emitted, dict) else {"loss": emitted}
    if values_are_readable():
        check_finite(emitted["loss"], "minimize")
    memory, moved = (last["optimizer"], last["buffers"]) if has_buffers else (last, ())
    return Minimized(
        after, memory, emitted["loss"], emitted.get("aux", ()), moved, emitted.get("observed", ())
    )


def _check_closure(
    problem: InnerProblem, loop: InnerLoop, batches: Tree, steps: int | None
) -> None:
    """Raise if what the user's functions compute depends on more than the loop is given."""
    first = first_row(loop.batches)

    def evaluate(*arguments: Any) -> Tree:
        with explain_first_row(batches, steps, first):
            return problem.evaluate(*arguments)

    functions = (problem.loss_fn, problem.observe)
    read = {**loop.inputs, "optimizer": {}}
    check_closure(evaluate, functions, read, loop.params, loop.state, first)

    parts = [type(part) for part in problem.optimizer.modules()]
    if all(part.__module__.startswith(OURS) for part in parts):
        return

    def update(inputs: Inputs, params: Tree, state: Any, batch: Tree) -> Tree:
        loss, aux = problem.loss(inputs, params, state, batch)
        grads = tree.map(torch.ones_like, params)
        return loop.update(inputs, grads, state, params, *tree.map(constant, (loss, aux)))

    sources = [
        part.update if issubclass(part, Optimizer) else part.forward
        for part in parts
        if issubclass(part, Optimizer | Schedule)
    ]
    given = (loop.inputs, loop.params, loop.state, first)
    check_closure(update, (*sources, problem.optimizer), *given, message=OF_OPTIMIZER)


def _check_arguments(
    optimizer: Any, params: Any, differentiate: Any, unused: Any, compile: bool
) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a metaopt Optimizer, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}. "
            "Use one from `metaopt.optimizers`, for example `metaopt.optimizers.SGD(lr=0.1)`."
        )
    if not isinstance(differentiate, Rule):
        raise TypeError(
            f"`differentiate` must be a rule, got {differentiate!r}. For example `Backprop()`, or "
            "`Implicit(ConjugateGradient())` for a linear solver."
        )
    if isinstance(params, nn.Module | Functional):
        raise TypeError(
            f"`params` must be a tree of tensors, got a {type(params).__name__}. Pass `net.params` "
            f"of `net = functional(model)`."
        )
    if unused not in get_args(Unused):
        raise ValueError(f'`unused` must be "zero" or "skip", got {unused!r}.')
    if compile and not torch.compiler.is_compiling() and not values_are_readable():
        raise ValueError(
            "`compile=True` was given to a `minimize` inside a torch.func transform, which torch "
            "cannot compile from within. Compile the outermost function instead: "
            "`meta_grad(task_loss, compile=True)`, or your own with `torch.compile`."
        )
    if unused == "skip" and compile:
        raise ValueError(
            'unused="skip" cannot be had with `compile=True`: a compiler does not see what a loss '
            "depends on. Leave one out."
        )
    if torch.compiler.is_compiling():  # a compiler cannot be asked who tracks a tensor
        return
    hidden = [
        f"{name}.{key}".lstrip(".")
        for name, module in optimizer.named_modules()
        for key in _find_tracked(module)
    ]
    if hidden:
        raise ValueError(
            f"{type(optimizer).__name__} has tensors that require grad and are neither parameters "
            f"nor buffers, {hidden}: they "
            "would get no derivative. Make each an `nn.Parameter`, or store it with "
            "`set_hyperparameter`."
        )


def _find_tracked(module: nn.Module) -> list[str]:
    """Return the names of plain attributes that require grad."""
    return [
        key
        for key, value in vars(module).items()
        if isinstance(value, Tensor) and is_tracked(value)
    ]
