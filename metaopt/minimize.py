"""The inner loop: a loss, an optimizer, and how gradients pass through."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.closure import check_closure
from metaopt.differentiate import Backprop, InnerLoop, Rule
from metaopt.errors import NonFiniteError
from metaopt.functional import functional, lent
from metaopt.kernels import any_order
from metaopt.optimizer import Observe, Optimizer, State
from metaopt.optimizer.hyperparameter import Value
from metaopt.scan.stream import Stream, first_row
from metaopt.transforms import values_are_readable
from metaopt.tree import Tree


class Minimized(NamedTuple):
    """What `minimize` returns: the last parameters and optimizer state, and the loss before each step, [steps]."""

    params: Tree
    opt_state: State
    losses: Tensor


def minimize(
    loss_fn: Callable[..., Tensor],
    optimizer: Optimizer,
    params: Tree,
    batches: Tree,
    *,
    steps: int | None = None,
    meta: Tree = None,
    opt_state: State | None = None,
    differentiate: Rule = Backprop(),  # noqa: B008
    compile: bool = False,
) -> Minimized:
    """Run w_{t+1} = w_t + u(grad L(w_t, batch_t), s_t, w_t) and return (w_T, s_T, [L(w_0), ..., L(w_{T-1})]).

    The result is differentiable in the initial parameters, the optimizer's parameters and tensors, `meta`, a given
    `opt_state` and floating-point batches, in the way that `differentiate` says. Nothing is changed in place.

    Args:
        loss_fn: `loss_fn(params, batch)`, or `loss_fn(params, batch, meta)` if `meta` is given, returns a scalar. If it is an
            `nn.Module`, its trainable parameters are differentiated too; its buffers stay as they are.
        optimizer: any `Optimizer`.
        params: initial parameters, a tree of floating-point tensors.
        batches: with `steps`, the one batch that every step sees (or None); without, a tree whose leaves all have time as
            their leading axis, one row a step. Or an iterator (a generator, a DataLoader, `iter(list_of_batches)`) that
            yields the batch of each step when it comes to it; the loop ends when it does. Except for "full", and where
            no gradients are enabled, all its batches are kept until the backward pass has run.
        steps: number of steps T.
        meta: what the outer level owns, a tree of tensors.
        opt_state: state to go on from; by default `optimizer.init(params)`.
        differentiate: how gradients pass through the loop: `Backprop()`, `FirstOrder()`, ...
        compile: compile one step and its derivative, for any number of steps; see `compiled`. Inside another compiled function
            this changes nothing: there the loop is unrolled.

    Raises:
        ValueError: the batches' leading axes differ, `steps` is missing, the loss is no scalar, or `loss_fn` reaches a
            tensor that requires grad through its closure; or `compile` inside a transform of `torch.func`.
        NonFiniteError: a loss is not finite. (Inside `vmap`, `grad` or a compiled function values cannot be read; there
            the value is passed on as it is.)

    Cost:
        That of the rule, and one forward pass of the loss that looks for closures while gradients are enabled.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"`optimizer` must be a metaopt Optimizer, got {type(optimizer).__module__}.{type(optimizer).__name__}. "
            "Use one from `optimizers`, for example `optimizers.SGD(lr=0.1)`."
        )
    if compile and not torch.compiler.is_compiling() and not values_are_readable():
        raise ValueError(
            "`compile=True` was given to a `minimize` inside a torch.func transform, which torch cannot compile from within. "
            "Compile the outermost function instead: `meta_grad(task_loss, compile=True)`, or your own with `torch.compile`."
        )
    same_batch = steps is not None
    xs, constant, steps = _batches_and_steps(batches, steps)
    module = functional(loss_fn) if isinstance(loss_fn, nn.Module) else None
    own_params = {} if module is None else module.params
    inputs = {"optimizer": _tensors(optimizer), "loss": own_params, "meta": meta, "batch": constant}

    def loss(inputs: Tree, params: Tree, x: Tree) -> Tensor:
        batch = inputs["batch"] if same_batch else x
        arguments = (params, batch) if meta is None else (params, batch, inputs["meta"])
        with any_order():
            value = loss_fn(*arguments) if module is None else module(inputs["loss"], *arguments)
        return _check_scalar(value)

    def loop_loss(inputs: Tree, params: Tree, state: State, x: Tree) -> tuple[Tensor, tuple[()]]:
        return loss(inputs, params, x), ()

    def update(inputs: Tree, grads: Tree, state: State, params: Tree, loss: Tensor, aux: tuple[()]) -> tuple[Tree, State]:
        if inputs is own:
            return optimizer.moved(grads, state, params, loss=loss)
        return lent(optimizer, inputs["optimizer"], optimizer.moved, grads, state, params, loss=loss)  # type: ignore[no-any-return]

    def rate(inputs: Tree, state: State, params: Tree, observe: Observe) -> Value:
        return lent(optimizer, inputs["optimizer"], optimizer.rate, state, params, observe)  # type: ignore[no-any-return]

    own = inputs
    state = optimizer.init(params) if opt_state is None else opt_state
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        check_closure(loss, loss_fn, {**inputs, "optimizer": {}}, params, first_row(xs))
    result = Minimized(*differentiate(InnerLoop(loop_loss, update, inputs, params, state, xs, steps, compile, rate)))
    if values_are_readable():
        check_finite(result.losses, "minimize")
    return result


def check_finite(losses: Tensor, where: str, *, unit: str = "step") -> None:
    """Raise `NonFiniteError` for the first entry of `losses` [n] that is not finite."""
    values = losses.detach().tolist()
    first = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
    if first is not None:
        raise NonFiniteError(where, first, values[first], values[first - 1] if first and unit == "step" else None, unit=unit)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _batches_and_steps(batches: Tree | Iterable[Tree], steps: int | None) -> tuple[Tree | Stream, Tree, int | None]:
    """Return (rows to scan over, the batch of every step, number of steps if known); one of the first two is empty."""
    leaves = tree.leaves(batches)
    is_leaf = len(leaves) == 1 and leaves[0] is batches  # no dict, list or tuple: these are trees
    streams = is_leaf and isinstance(batches, Iterable) and not isinstance(batches, Tensor | str)
    if steps is not None:
        if isinstance(steps, bool) or not isinstance(steps, numbers.Integral) or steps < 1:
            raise ValueError(f"`steps` must be a positive integer, got {steps!r}.")
        if streams:
            raise ValueError(
                f"`steps` must be left out when `batches` is an iterator, got {steps}: the loop ends when the iterator does. "
                "Pass `itertools.islice(batches, steps)` to end it earlier."
            )
        return (), batches, int(steps)
    if streams:
        return Stream(batches), None, None
    lengths = tree.leading_axes(batches)
    if not lengths or -1 in lengths.values():
        without = [path for path, length in lengths.items() if length < 0]
        raise ValueError(
            "`steps` is missing: without it every leaf of `batches` needs the leading axis time, which "
            f"{without or 'an empty tree'} has not. Pass `steps=` to use the same batch at every step."
        )
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"The leading axis of every leaf of `batches` must be the number of steps, got {lengths}. "
            "Stack one batch per step, or pass `steps=` to use the same batch at every step."
        )
    (length,) = set(lengths.values())
    if length == 0:
        raise ValueError("`batches` must hold at least one step, got the leading axis 0.")
    return batches, None, length


def _check_scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        kind = f"{value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"`loss_fn` must return a floating-point scalar, got a {kind}. Take the mean or the sum.")
    return value
