"""An inner problem as its user writes it, as the pure functions that an `InnerLoop` asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt._functional import Params, functional, lent
from metaopt.checks import check_scalar, describe
from metaopt.exact_ops import any_order
from metaopt.optimizer import Observe, Optimizer
from metaopt.optimizer.hyperparameter import Value
from metaopt.torch_internals import version
from metaopt.tree import Tree

Unused = Literal["zero", "skip"]


class InnerProblem:
    """A loss, an optimizer and an observer as functions of explicit tensors.

    The state of a step is that of the optimizer, or, with buffers, {"optimizer", "buffers"}. What a
    loss says beside its value is {"aux", "buffers"}, with those of the two that there are.

    Args:
        loss_fn: as for `minimize`.
        optimizer: makes the steps.
        observe: as for `minimize`.
        same_batch: whether every step sees the same batch, which is then among the inputs.
        has_meta: whether `loss_fn` takes `meta`.
        has_buffers: whether it takes and returns buffers.
        inputs: {"optimizer", "loss", "meta", "batch"} as they are given; whoever gives others is
            lending them.
    """

    def __init__(
        self,
        loss_fn: Callable[..., Any],
        optimizer: Optimizer,
        observe: Callable[..., Tree] | None,
        *,
        same_batch: bool,
        has_meta: bool,
        has_buffers: bool,
    ):
        self.loss_fn, self.optimizer, self.observe = loss_fn, optimizer, observe
        self.same_batch, self.has_meta, self.has_buffers = same_batch, has_meta, has_buffers
        self.module = functional(loss_fn) if isinstance(loss_fn, nn.Module) else None
        self.own_params: Params = {} if self.module is None else self.module.params
        own = optimizer
        self.own_tensors = dict(own.named_parameters()) | dict(own.named_buffers())

    def loss(self, inputs: Tree, params: Tree, state: Any, x: Tree) -> tuple[Tensor, Tree]:
        """Return (the loss, what it says beside it)."""
        with any_order():
            result = self._called(self._loss_with(inputs), inputs, params, state, x)
        return self._parted(result, state)  # outside: in it every look at a tensor takes longer

    def update(
        self, inputs: Tree, grads: Tree, state: Any, params: Tree, loss: Tensor, aux: Tree
    ) -> tuple[Tree, Any]:
        """Return (parameters, state) after one application of the optimizer."""
        before = state["optimizer"] if self.has_buffers else state
        move, tensors = self.optimizer.moved, inputs["optimizer"]
        if tensors is self.own_tensors:
            params, after = move(grads, before, params, loss=loss)
        else:
            params, after = lent(self.optimizer, tensors, move, grads, before, params, loss=loss)
        return params, {
            "optimizer": after,
            "buffers": aux["buffers"],
        } if self.has_buffers else after

    def rate(self, inputs: Tree, state: Any, params: Tree, observe: Observe) -> Value:
        """Return the optimizer's present step size."""
        memory = state["optimizer"] if self.has_buffers else state
        return lent(
            self.optimizer, inputs["optimizer"], self.optimizer.rate, memory, params, observe
        )  # type: ignore[no-any-return]

    def emit(self, inputs: Tree, after: tuple[Tree, Any], x: Tree, loss: Tensor, aux: Tree) -> Tree:
        """Return {"loss", "aux", "observed"}, or the loss alone if it is all there is."""
        emitted: Tree = {"loss": loss}
        if "aux" in aux:
            emitted["aux"] = aux["aux"]
        if self.observe is not None:
            with any_order():
                observed = self._called(self.observe, inputs, *after, x)
            emitted["observed"] = tree.map(lambda leaf: as_tensor(leaf, "observe", loss), observed)
        return loss if len(emitted) == 1 else emitted

    def evaluate(self, inputs: Tree, params: Tree, state: Any, x: Tree) -> Tree:
        """Return all that the loss and the observer compute in one place, to see what it depends
        on.
        """
        loss, aux = self.loss(inputs, params, state, x)
        after = {**state, "buffers": aux["buffers"]} if self.has_buffers else state
        return self.emit(inputs, (params, after), x, loss, aux), aux

    def describe(self) -> str:
        """Return the settings of the optimizer."""
        try:
            return json.dumps(self.optimizer.config())
        except TypeError:  # it cannot be saved
            return repr(self.optimizer)

    def _loss_with(self, inputs: Tree) -> Callable[..., Any]:
        if self.module is None:
            return self.loss_fn
        own = inputs["loss"]
        return lambda *args, **kwargs: self.module(own, *args, **kwargs)  # type: ignore[misc]

    def _called(
        self, function: Callable[..., Any], inputs: Tree, params: Tree, state: Any, x: Tree
    ) -> Any:
        batch = inputs["batch"] if self.same_batch else x
        arguments = (params, batch, inputs["meta"]) if self.has_meta else (params, batch)
        if not self.has_buffers:
            return function(*arguments)
        before = [version(leaf) for leaf in tree.leaves(state["buffers"])]
        result = function(*arguments, buffers=state["buffers"])
        if [version(leaf) for leaf in tree.leaves(state["buffers"])] != before:
            raise ValueError(
                "`buffers` must not be changed in place, by `loss_fn` or `observe`. Return new "
                "ones: `net.with_buffers(params, buffers, x)` works on copies."
            )
        return result

    def _parted(self, result: Any, state: Any) -> tuple[Tensor, Tree]:
        """Return (loss, {"buffers", "aux"}) of what the loss function returned."""
        named, value = {}, result
        if self.has_buffers:
            if type(result) is not tuple or len(result) not in (2, 3):
                raise ValueError(
                    "`loss_fn` must return (loss, buffers) or (loss, buffers, aux) where "
                    "`minimize` is given `buffers`, got "
                    f"{describe(result)}. For example `output, buffers = net.with_buffers(params, "
                    f"buffers, x)`."
                )
            value, named["buffers"], *rest = result
            _check_buffers(state["buffers"], named["buffers"])
        else:
            value, *rest = result if type(result) is tuple and len(result) == 2 else (result,)
        loss = check_scalar(value)
        if rest and rest[0] is not None:
            named["aux"] = tree.map(lambda leaf: as_tensor(leaf, "loss_fn", loss), rest[0])
        return loss, named


def _check_buffers(before: Tree, after: Tree) -> None:
    """Raise ValueError unless these buffers can take the place of the ones before."""
    old, new = (
        tree.leaves(before),
        tree.leaves_like(before, after, "buffers, as `loss_fn` returns them,"),
    )
    for place, (was, now) in enumerate(zip(old, new, strict=True)):
        if not isinstance(now, Tensor) or now.dtype != was.dtype or now.shape != was.shape:
            path = tree.named_leaves(before)[place][0]
            raise ValueError(
                f"`loss_fn` must return buffers of the dtype and shape that they had, got "
                f"{describe(now)} at {path} after {describe(was)}."
            )


def as_tensor(leaf: Any, where: str, like: Tensor) -> Tensor:
    """Return a number as a tensor, and a tensor as it is.

    Raises:
        TypeError: it is neither; `where` says who returned it.
    """
    if isinstance(leaf, Tensor):
        return leaf
    if isinstance(leaf, bool | int | float):
        return torch.as_tensor(leaf, device=like.device)
    raise TypeError(
        f"What `{where}` returns must be a tree of tensors, got a {type(leaf).__name__} in it. It "
        f"is stacked over steps: "
        "leave out what cannot be."
    )
