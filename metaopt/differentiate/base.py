"""The protocol between the inner loop and the rules that differentiate it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.graph import is_varied
from metaopt.autodiff.mean_gradient import MeanGradient
from metaopt.autodiff.replay import drawn_again
from metaopt.compiled import compiled
from metaopt.exact_ops import any_order
from metaopt.scan import Memory, Pullback, plain_loops_inside, scan
from metaopt.scan.stream import Stream, last_row
from metaopt.transforms import constant, has_tangent, is_last, is_tracked, tracking_levels
from metaopt.tree import Tree

# (inputs, params, state, batch) -> (loss, aux)
Loss = Callable[[Tree, Tree, Any, Tree], tuple[Tensor, Tree]]
Observe = Callable[[], tuple[Tree, Tensor]]
# (inputs, params, state, batch) -> (gradients, loss, aux)
Gradient = Callable[[Tree, Tree, Any, Tree], tuple[Tree, Tensor, Tree]]
# (inputs, gradients, state, params, loss, aux) -> (params, state)
Update = Callable[[Tree, Tree, Any, Tree, Tensor, Tree], tuple[Tree, Any]]
# (inputs, (params, state) after the step, batch, loss, aux) -> a tree of tensors
Emit = Callable[[Tree, tuple[Tree, Any], Tree, Tensor, Tree], Tree]
# (inputs, state, params, what gives (gradients, loss)) -> the optimizer's step size
Rate = Callable[[Tree, Any, Tree, Observe], float | Tensor]
Scale = float | Literal["lr"]


def emit_loss(
    inputs: Tree, after: tuple[Tree, Any], batch: Tree, loss: Tensor, aux: Tree
) -> Tensor:
    """Return the loss: all that a loop says of a step if nobody asks for more."""
    return loss


@dataclass(frozen=True)
class InnerLoop:
    """An inner problem as pure functions of explicit tensors.

    Attributes:
        loss: (inputs, params, state, batch) -> (scalar loss, aux), with a tree of tensors that is
            handed to `update`; with derivatives of any order, see `any_order`.
        update: (inputs, grads, state, params, loss, aux) -> (params, state): one application of the
            optimizer.
        inputs: what every step reads: the tensors of the "optimizer", which the loss does not read,
            those of the "loss", "meta" and a "batch" that is the same at every step.
        params: initial parameters.
        state: initial state: the optimizer's, and whatever else goes on from step to step.
        batches: leaves with the leading axis `steps`; without leaves, every step sees
            `inputs["batch"]`. Or a `Stream`.
        steps: number of steps; None for a `Stream`, which ends when it ends.
        compile: whether what runs is to be compiled.
        rate: (inputs, state, params, observe) -> the step size of the update that would be made
            next; `observe()` gives the gradients and the loss there, if it needs them. None where
            there is no optimizer.
        emit: what the loop says of each step, stacked over steps; the loss comes first in it.
        describe: returns the settings of the functions, as text.
        skips: whether the gradient of a parameter is None, not zero, at a step whose loss does not
            depend on it.
    """

    loss: Loss
    update: Update
    inputs: dict[str, Tree]
    params: Tree
    state: Any
    batches: Tree | Stream
    steps: int | None
    compile: bool = False
    rate: Rate | None = None
    emit: Emit = emit_loss
    describe: Callable[[], str] = str
    skips: bool = False

    @property
    def gradient(self) -> MeanGradient:
        """The gradient of the loss, of a whole batch."""
        return MeanGradient(self.loss, allow_unused=self.skips)


class Rule(Protocol):
    """How gradients pass through an inner loop: run it, and attach a derivative to what comes out."""

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tree]:
        """Return (params, state, what the loop emits, with the leading axis steps)."""
        ...


class End(NamedTuple):
    """Where a loop ended: the last parameters and state, and the batch of the last step."""

    params: Tree
    state: Any
    batch: Tree


class PointRule:
    """A rule that looks only at where the loop ended, not at the steps that led there.

    What the end depends on is then what the loss there reads: `inputs` without the optimizer, and
    the batch of the last step. The initial parameters and state, and the optimizer's tensors,
    receive nothing: to ask for nothing else is an error. The returned state, the losses and what
    else the loop emits are constants.
    """

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Tree
    ) -> tuple[Tree, dict[str, Tensor]]:
        """Return the cotangents of what the loss reads, and what there is to say about them.

        A function of the tensors in its arguments, built from torch's own operations: it can be
        differentiated and compiled.

        Args:
            loop: its `inputs` are differentiated; its initial parameters, state and batches are not
                looked at.
            end: where it ended.
            cotangent: v, a tree like `end.params`.
            wanted: (tree of bools like `loop.inputs` without "optimizer", tree of bools like
                `end.batch`); a bool may stand for a whole part.

        Returns:
            A tree like (`loop.inputs` without "optimizer", `end.batch`) with cotangents, None for
            what is not wanted; and name -> statistic.
        """
        raise TypeError(
            f"{type(self).__name__} must define `pull_back(loop, end, cotangent, wanted)`."
        )

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tree]:
        read = without_optimizer(loop.inputs)
        given = {
            "initial parameters": loop.params,
            "optimizer's tensors": loop.inputs["optimizer"],
            "initial state": loop.state,
        }
        for what, tensors in given.items():
            refuse_zeros(self, what, tensors, read)
        params, state, emitted = run(loop)
        params = attach(self, loop, End(params, state, last_row(loop.batches)))
        return with_refusal(self, params, given, read), state, emitted


def attach(rule: PointRule, loop: InnerLoop, end: End) -> Tree:
    """Return the last parameters with the derivative that `rule` gives them.

    Nothing is computed before it is asked for.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        read = (without_optimizer(loop.inputs), end.batch)
        if not (_any_tracked(read) or any(map(has_tangent, tree.leaves(read)))):
            return tree.map(torch.Tensor.detach, end.params)

    def pull_back(
        params: Tree, given: tuple[Tree, Any, Tree], cotangent: Tree, wanted: tuple[Tree, Any, Tree]
    ) -> Tree:
        (inputs, state, batch), (in_inputs, in_state, in_batch) = given, wanted
        in_read = (without_optimizer(in_inputs), in_batch)
        if not any(tree.leaves(in_read)):
            return _nothing(wanted)
        to_read, to_batch = pulled_back(
            rule, replace(loop, inputs=inputs), End(params, state, batch), cotangent, in_read
        )
        to_inputs = {
            name: to_read[name] if name in to_read else _nothing(part)
            for name, part in in_inputs.items()
        }
        return to_inputs, _nothing(in_state), to_batch

    return with_derivative(pull_back, end.params, (loop.inputs, end.state, end.batch))


def pulled_back(
    rule: PointRule, loop: InnerLoop, end: End, cotangent: Tree, wanted: tuple[Tree, Tree]
) -> tuple[Tree, Tree]:
    """Return the cotangents that `rule.pull_back` gives; with `loop.compile` it is compiled, unless
    it is itself differentiated.
    """

    def bars(inputs: Tree, end: End, cotangent: Tree) -> Tree:
        return rule.pull_back(replace(loop, inputs=inputs), end, cotangent, wanted)[0]

    found: tuple[Tree, Tree]
    if loop.compile and not torch.is_grad_enabled():
        found = compiled(bars)(loop.inputs, end, cotangent)
    else:
        found, _ = rule.pull_back(loop, end, cotangent, wanted)
    return found


def unroll(
    loop: InnerLoop, gradient: Gradient, memory: Memory, pullback: Pullback | None = None
) -> tuple[Tree, Any, Tree]:
    """Run the loop with this gradient oracle, keep what `memory` says, and rebuild steps for the
    way back with `pullback`.
    """

    def step(inputs: Tree, carry: Tree, batch: Tree) -> tuple[Tree, Tree]:
        params, state = carry
        grads, loss, aux = gradient(inputs, params, state, batch)
        after = loop.update(inputs, grads, state, params, loss, aux)
        return after, loop.emit(inputs, after, batch, loss, aux)

    carry = (loop.params, loop.state)
    (params, state), emitted = scan(
        step,
        loop.inputs,
        carry,
        loop.batches,
        loop.steps,
        memory,
        pullback=pullback,
        compile=loop.compile,
        describe=loop.describe,
    )
    return params, state, emitted


def run(loop: InnerLoop) -> tuple[Tree, Any, Tree]:
    """Run the loop without a graph; what comes out is constant."""
    gradient = loop.gradient
    if is_last():  # nothing of it has a derivative
        return unroll(loop, gradient, "full")
    inputs, params, state, batches = tree.map(
        constant, (loop.inputs, loop.params, loop.state, loop.batches)
    )
    with torch.no_grad():
        found = unroll(
            replace(loop, inputs=inputs, params=params, state=state, batches=batches),
            gradient,
            "full",
        )
    return tree.map(constant, found)  # type: ignore[no-any-return]


def at_end(loop: InnerLoop, end: End) -> tuple[Callable[[Tree, Tree], Tensor], Tree]:
    """Return the loss at the end as a function (params, what it reads) -> L, and what it reads:
    inputs and batch.
    """

    def loss(params: Tree, read: tuple[dict[str, Tree], Tree]) -> Tensor:
        inputs, batch = read
        return loop.loss(
            {**inputs, "optimizer": loop.inputs["optimizer"]}, params, end.state, batch
        )[0]

    return loss, (without_optimizer(loop.inputs), end.batch)


def sources(loop: InnerLoop) -> tuple[dict[str, Tree], Tree, Any, Tree]:
    """Return everything that is given to the loop: inputs, params, state and batches, those of a
    stream as a list.
    """
    batches = list(loop.batches.watch()) if isinstance(loop.batches, Stream) else loop.batches
    return loop.inputs, loop.params, loop.state, batches


def starting_from(loop: InnerLoop, given: tuple[dict[str, Tree], Tree, Any, Tree]) -> InnerLoop:
    """Return the loop with other `sources`."""
    inputs, params, state, batches = given
    if isinstance(loop.batches, Stream):
        batches = Stream(batches)
    return replace(loop, inputs=inputs, params=params, state=state, batches=batches)


def weighted_end(loop: InnerLoop, weights: Tree) -> Tensor:
    """Run the loop and return <weights, (params, state, what it emits)>."""
    with plain_loops_inside(), any_order():
        results = unroll(replace(loop, compile=False), loop.gradient, "full")
    pairs = zip(tree.leaves(results), tree.leaves(weights), strict=True)
    known = [(result, weight) for result, weight in pairs if weight is not None]
    return tree.sum_leaves(
        torch.Tensor.sum, [tree.as_real(result) * tree.as_real(weight) for result, weight in known]
    )


def scaled(rule: object, scale: Scale, loop: InnerLoop, end: End, cotangent: Tree) -> Tree:
    """Return scale v, where "lr" is the step size that the optimizer would use next."""
    if isinstance(scale, str):
        if loop.rate is None:
            raise ValueError(
                f'{type(rule).__name__}: `scale="lr"` must find one step size in the optimizer, '
                f"got no optimizer. Give a number: "
                "`scale=0.1`."
            )
        with drawn_again(end):
            rate = loop.rate(loop.inputs, end.state, end.params, lambda: _observed(loop, end))
        return tree.map(lambda v: rate * v, cotangent)
    return cotangent if scale == 1 else tree.map(lambda v: scale * v, cotangent)


def _observed(loop: InnerLoop, end: End) -> tuple[Tree, Tensor]:
    grads, loss, _ = MeanGradient(loop.loss)(loop.inputs, *end)
    return grads, loss


def check_scale(rule: object, scale: object) -> None:
    """Raise ValueError unless it is a positive, finite number or "lr"."""
    is_number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if scale != "lr" and not (is_number and 0 < scale < math.inf):  # type: ignore[operator]
        raise ValueError(
            f'{type(rule).__name__}: `scale` must be a positive number or "lr", got {scale!r}.'
        )


def without_optimizer(inputs: dict[str, Tree]) -> dict[str, Tree]:
    """Return what the loss reads."""
    return {name: part for name, part in inputs.items() if name != "optimizer"}


def refuse_zeros(rule: object, what: str, tensors: Tree, read: Tree) -> None:
    """Raise if the derivative in tensors is asked for that are not among those the loss reads, and
    would be zero.

    So `torch.func.grad` does, and `gradient` where plain autograd stands in for it. A backward pass
    says only when it comes what it asks for: see `with_refusal`.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    for name, leaf in _unread(tensors, read):
        if tracking_levels(leaf) - {0} or is_varied(leaf):
            raise _zeros(rule, what, name, leaf)


def with_refusal(rule: object, values: Tree, given: dict[str, Tree], read: Tree) -> Tree:
    """Return the values; if they came out as constants though something given requires grad, a
    backward pass is an error.

    Args:
        rule: whose derivative in what is given is zero.
        values: a tree of tensors.
        given: what it is called -> tensors.
        read: what the rule has a derivative in.

    Raises:
        ValueError: in the backward pass. Nothing happens before.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _any_tracked(values):
        return values
    tracked = [
        (what, *one)
        for what, tensors in given.items()
        for one in _unread(tensors, read)
        if is_tracked(one[1])
    ]
    if not tracked:
        return values

    def refuse(*_: Tree) -> Tree:
        raise _zeros(rule, *tracked[0])

    return with_derivative(refuse, values, [leaf for _, _, leaf in tracked])


def _unread(tensors: Tree, read: Tree) -> list[tuple[str, Tensor]]:
    """Return (path, leaf) for the tensors that are not among those in `read`."""
    known = {id(leaf) for leaf in tree.leaves(read)}
    return [
        (name, leaf)
        for name, leaf in tree.named_leaves(tensors)
        if isinstance(leaf, Tensor) and id(leaf) not in known
    ]


def _zeros(rule: object, what: str, name: str, leaf: Tensor) -> ValueError:
    return ValueError(
        f"{type(rule).__name__}: the {what} must not be differentiated, but {name} (shape "
        f"{tuple(leaf.shape)}) is. For this "
        "rule the result does not depend on them: the answer would be zeros. Detach them and pass "
        "what is to be learned as `meta`; or, as in iMAML, pass the same tensors as `meta` too, "
        "and let the loss depend on them."
    )


def _any_tracked(values: Tree) -> bool:
    return any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in tree.leaves(values))


def _nothing(values: Tree) -> Tree:
    return tree.map(lambda _: None, values)
