"""The protocol between the inner loop and the rules that differentiate it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from metaopt.scan import Memory, Pullback, scan
from metaopt.stream import Stream
from metaopt.tree import Tree

# (inputs, params, batch) -> (gradients, loss)
Gradient = Callable[[Tree, Tree, Tree], tuple[Tree, Tensor]]
# (inputs, gradients, optimizer state, params, loss) -> (params, optimizer state)
Update = Callable[[Tree, Tree, Any, Tree, Tensor], tuple[Tree, Any]]


@dataclass(frozen=True)
class InnerLoop:
    """An inner problem as pure functions of explicit tensors.

    Attributes:
        loss: (inputs, params, batch) -> scalar loss.
        update: (inputs, grads, state, params, loss) -> (params, state): one application of the optimizer.
        inputs: what every step reads: the tensors of the "optimizer", which the loss does not read, those of the "loss", "meta"
            and a "batch" that is the same at every step.
        params: initial parameters.
        state: initial optimizer state.
        batches: leaves with the leading axis `steps`; without leaves, every step sees `inputs["batch"]`. Or a `Stream`.
        steps: number of steps; None for a `Stream`, which ends when it ends.
        compile: whether what runs is to be compiled.
    """

    loss: Callable[[Tree, Tree, Tree], Tensor]
    update: Update
    inputs: dict[str, Tree]
    params: Tree
    state: Any
    batches: Tree | Stream
    steps: int | None
    compile: bool = False


class Rule(Protocol):
    """How gradients pass through an inner loop: run it, and attach a derivative to what comes out."""

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tensor]:
        """Return (params, optimizer state, losses [steps])."""
        ...


def unroll(loop: InnerLoop, gradient: Gradient, memory: Memory, pullback: Pullback | None = None) -> tuple[Tree, Any, Tensor]:
    """Run the loop with this gradient oracle, keep what `memory` says, and rebuild steps for the way back with `pullback`."""

    def step(inputs: Tree, carry: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        params, state = carry
        grads, loss = gradient(inputs, params, batch)
        return loop.update(inputs, grads, state, params, loss), loss

    carry = (loop.params, loop.state)
    (params, state), losses = scan(
        step, loop.inputs, carry, loop.batches, loop.steps, memory, pullback=pullback, compile=loop.compile
    )
    return params, state, losses
