"""The protocol between an inner loop and the rules that differentiate it: a rule is a vjp of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypedDict

from torch import Tensor

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.modes import noting_modes
from metaopt.autodiff.replay import Ambient
from metaopt.scan.stream import Stream
from metaopt.transforms import constant, is_unrecorded, values_are_readable
from metaopt.tree import Tree


class Inputs(TypedDict):
    """What every step of a loop reads: a tree of tensors each.

    Attributes:
        optimizer: the optimizer's tensors, which the loss does not read.
        loss: those that the loss owns.
        meta: what the outer level owns.
        batch: the batch that is the same at every step.
    """

    optimizer: Tree
    loss: Tree
    meta: Tree
    batch: Tree


# (inputs, params, state, batch) -> (loss, aux)
Loss = Callable[[Inputs, Tree, Any, Tree], tuple[Tensor, Tree]]
# (inputs, gradients, state, params, loss, aux) -> (params, state)
Update = Callable[[Inputs, Tree, Any, Tree, Tensor, Tree], tuple[Tree, Any]]
# (inputs, (params, state) after the step, batch, loss, aux) -> a tree of tensors
Emit = Callable[[Inputs, tuple[Tree, Any], Tree, Tensor, Tree], Tree]
# (inputs, v, gradients, state, params, loss) -> [d(params after)/d(gradients)]' v
Precondition = Callable[[Inputs, Tree, Tree, Any, Tree, Tensor], Tree]
# (inputs, state, params, what gives (gradients, loss)) -> the optimizer's step size
Rate = Callable[[Inputs, Any, Tree, Callable[[], tuple[Tree, Tensor]]], float | Tensor]


def emit_loss(
    inputs: Inputs, after: tuple[Tree, Any], batch: Tree, loss: Tensor, aux: Tree
) -> Tensor:
    """Return the loss: all that a loop says of a step if nobody asks for more."""
    return loss


class Given(NamedTuple):
    """What a loop was given; or which of it is wanted, as bools; or the cotangents of it.

    Of wanted leaves, one bool may stand for a whole part. The batches of a `Stream` are a list.
    """

    inputs: Inputs
    params: Tree
    state: Any
    batches: Tree


class Result(NamedTuple):
    """What a loop returns, or the cotangents of it, where None is zero.

    Attributes:
        params: the last parameters.
        state: the last state.
        emitted: what the loop emits, with the leading axis steps.
    """

    params: Tree
    state: Any
    emitted: Tree


# (cotangents of the result, what is wanted) -> cotangents of what was given, None if not wanted
Pullback = Callable[[Result, Given], Given]


@dataclass(frozen=True)
class InnerLoop:
    """An inner problem as pure functions of explicit tensors.

    Attributes:
        loss: (inputs, params, state, batch) -> (scalar loss, aux), with aux, a tree of tensors
            handed to `update`; its derivatives of every order must be right, see `any_order`.
        update: (inputs, grads, state, params, loss, aux) -> (params, state): one application of the
            optimizer.
        inputs: what every step reads.
        params: initial parameters.
        state: initial state: the optimizer's, and everything else that goes on from step to step.
        batches: leaves with the leading axis `steps`; without leaves, every step sees
            `inputs["batch"]`. Or a `Stream`.
        steps: number of steps; 0 for a loop that ends where it starts; None for a `Stream`, which
            ends when it ends.
        compile: whether what runs is to be compiled.
        rate: (inputs, state, params, observe) -> the step size of the update that would be made
            next; `observe()` gives the gradients and the loss there, if it needs them. None where
            there is no optimizer.
        precondition: the transposed derivative of `update` in the gradients, applied to a vector;
            None where the graph of `update` is as good.
        emit: what the loop says of each step, stacked over steps; the loss comes first in it.
        describe: returns the settings of the functions, as text.
        skips: whether the gradient of a parameter is None, not zero, at a step whose loss does not
            depend on it.
        loss_at_end: the loss that rules look at where the loop ended, if it differs from `loss`.
        loss_around: the loss that rules look at elsewhere, if it differs from `loss`.
        is_random: whether the loss may draw random numbers, which are then drawn again.
    """

    loss: Loss
    update: Update
    inputs: Inputs
    params: Tree
    state: Any
    batches: Tree | Stream
    steps: int | None
    compile: bool = False
    rate: Rate | None = None
    precondition: Precondition | None = None
    emit: Emit = emit_loss
    describe: Callable[[], str] = str  # str() is ""
    skips: bool = False
    loss_at_end: Loss | None = None
    loss_around: Loss | None = None
    is_random: bool = True

    def gradient(
        self, inputs: Inputs, params: Tree, state: Any, batch: Tree
    ) -> tuple[Tree, Tensor, Tree]:
        """Return (gradient of the loss in the parameters, loss, aux)."""
        return gradient(lambda at: self.loss(inputs, at, state, batch), params)

    def given(self) -> Given:
        """Return what the loop was given; a stream is read to its end."""
        batches = self.batches
        return Given(
            self.inputs,
            self.params,
            self.state,
            list(batches.watch()) if isinstance(batches, Stream) else batches,
        )

    def starting_from(self, given: Given) -> InnerLoop:
        """Return the loop with other tensors."""
        inputs, params, state, batches = given
        if isinstance(self.batches, Stream):
            batches = Stream(batches)
        return replace(self, inputs=inputs, params=params, state=state, batches=batches)


class Rule:
    """How gradients pass through an inner loop: a rule runs it, and knows its vjp.

    To make a rule, define `vjp`. If only the end point matters, derive from `PointRule` and define
    its `pull_back`.
    """

    def vjp(self, loop: InnerLoop) -> tuple[Result, Pullback]:
        """Return the loop's result, and the function that pulls its cotangents back.

        The result is a constant. The pullback may be differentiable in the loop's tensors, and in
        the cotangents: then so is the result of `attach`, any number of times.
        """
        raise TypeError(f"{type(self).__name__} must define `vjp(loop) -> (result, pullback)`.")

    def attach(self, loop: InnerLoop) -> Result:
        """Return the result with the pullback as its derivative, under autograd and `torch.func`.

        Where the backward pass is itself differentiated or transformed, the loop runs again: the
        derivative is then that of the pullback as a function of the tensors of that moment. The
        pullback sees the random numbers that the loop saw, and models in the mode, training or
        not, that they were in.
        """
        given = loop.given()
        ambient = Ambient.now(tree.leaves(given))
        loop = loop.starting_from(given)
        with noting_modes() as modes:
            result, pullback = self.vjp(loop.starting_from(tree.map(constant, given)))
        is_plain = values_are_readable()

        def pull_back(_: Result, given: Given, cotangents: Result, wanted: Given) -> Given:
            if is_plain and is_unrecorded():
                return pullback(cotangents, wanted)
            _, again = self.vjp(loop.starting_from(given))
            with ambient.restored():  # the run has drawn numbers
                return again(cotangents, wanted)

        return with_derivative(pull_back, result, given, ambient, modes)  # type: ignore[no-any-return]

    def ignored(self, loop: InnerLoop) -> dict[str, Tree]:
        """Return name -> tensors that the loop is given, and in which this rule has no derivative.

        Asking `minimize` only for derivatives in these is an error.
        """
        return {}
