"""An inner problem as its user writes it, as the pure functions that an `InnerLoop` asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt._functional import Params, functional, lend
from metaopt.checks import check_scalar, describe
from metaopt.differentiate import InnerLoop, Inputs
from metaopt.exact_ops import any_order
from metaopt.optimizer import Observe, Optimizer
from metaopt.optimizer.by_name import Value
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

    def inputs(self, meta: Tree, batch: Tree) -> Inputs:
        """Return what every step reads, with the tensors that the optimizer and the loss own."""
        own = self.own_params
        return {"optimizer": self.own_tensors, "loss": own, "meta": meta, "batch": batch}

    def make_loop(
        self,
        inputs: Inputs,
        params: Tree,
        state: Any,
        batches: Tree,
        steps: int | None,
        *,
        compile: bool,
        skips: bool,
    ) -> InnerLoop:
        """Return the loop of this problem from here; see `InnerLoop` for the arguments."""
        return InnerLoop(
            self.loss,
            self.update,
            inputs,
            params,
            state,
            batches,
            steps,
            compile,
            rate=self.rate,
            precondition=self.precondition,
            emit=self.emit,
            describe=self.describe,
            skips=skips,
        )

    def loss(self, inputs: Inputs, params: Tree, state: Any, x: Tree) -> tuple[Tensor, Tree]:
        """Return (the loss, what it says beside it)."""
        arguments, named = self._arguments(inputs, params, state, x)
        before = _versions(named) if named else []
        with any_order():
            if self.module is None:
                result = self.loss_fn(*arguments, **named)
            else:
                result = self.module(inputs["loss"], *arguments, **named)
        if named:
            _check_unwritten(named, before)
        return self._split(result, state)  # outside: in it every look at a tensor takes longer

    def update(
        self, inputs: Inputs, grads: Tree, state: Any, params: Tree, loss: Tensor, aux: Tree
    ) -> tuple[Tree, Any]:
        """Return (parameters, state) after one application of the optimizer."""
        before = state["optimizer"] if self.has_buffers else state
        move, tensors = self.optimizer.moved, inputs["optimizer"]
        if tensors is self.own_tensors:
            params, after = move(grads, before, params, loss=loss)
        else:
            params, after = lend(self.optimizer, tensors, move, grads, before, params, loss=loss)
        if self.has_buffers:
            after = {"optimizer": after, "buffers": aux["buffers"]}
        return params, after

    def rate(self, inputs: Inputs, state: Any, params: Tree, observe: Observe) -> Value:
        """Return the optimizer's present step size."""
        memory = state["optimizer"] if self.has_buffers else state
        optimizer, tensors = self.optimizer, inputs["optimizer"]
        return lend(optimizer, tensors, optimizer.rate, memory, params, observe)  # type: ignore[no-any-return]

    def precondition(
        self, inputs: Inputs, v: Tree, grads: Tree, state: Any, params: Tree, loss: Tensor
    ) -> Tree:
        """Return what the derivative of the optimizer's update makes of v."""
        memory = state["optimizer"] if self.has_buffers else state
        optimizer, tensors = self.optimizer, inputs["optimizer"]
        apply = optimizer.precondition
        return lend(optimizer, tensors, apply, v, grads, memory, params, loss=loss)

    def emit(
        self, inputs: Inputs, after: tuple[Tree, Any], x: Tree, loss: Tensor, aux: Tree
    ) -> Tree:
        """Return {"loss", "aux", "observed"}, or the loss alone if it is all there is."""
        emitted: Tree = {"loss": loss}
        if "aux" in aux:
            emitted["aux"] = aux["aux"]
        if self.observe is not None:
            arguments, named = self._arguments(inputs, *after, x)
            before = _versions(named) if named else []
            with any_order():
                observed = self.observe(*arguments, **named)
            if named:
                _check_unwritten(named, before)
            emitted["observed"] = tree.map(lambda leaf: as_tensor(leaf, "observe", loss), observed)
        return loss if len(emitted) == 1 else emitted

    def evaluate(self, inputs: Inputs, params: Tree, state: Any, x: Tree) -> Tree:
        """Return all that the loss and the observer compute, to see what it depends on."""
        loss, aux = self.loss(inputs, params, state, x)
        after = {**state, "buffers": aux["buffers"]} if self.has_buffers else state
        return self.emit(inputs, (params, after), x, loss, aux), aux

    def describe(self) -> str:
        """Return the settings of the optimizer."""
        try:
            return json.dumps(self.optimizer.config())
        except TypeError:  # it cannot be saved
            return repr(self.optimizer)

    def _arguments(self, inputs: Inputs, params: Tree, state: Any, x: Tree) -> tuple[Tree, Tree]:
        """Return what the loss and the observer get: (by place, by name)."""
        batch = inputs["batch"] if self.same_batch else x
        arguments = (params, batch, inputs["meta"]) if self.has_meta else (params, batch)
        return arguments, {"buffers": state["buffers"]} if self.has_buffers else {}

    def _split(self, result: Any, state: Any) -> tuple[Tensor, Tree]:
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


def _versions(named: Tree) -> list[int]:
    return [version(leaf) for leaf in tree.leaves(named)]


def _check_unwritten(named: Tree, before: list[int]) -> None:
    if _versions(named) != before:
        raise ValueError(
            "`buffers` must not be changed in place, by `loss_fn` or `observe`. Return new "
            "ones: `net.with_buffers(params, buffers, x)` works on copies."
        )


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
