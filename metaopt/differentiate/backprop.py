"""Backpropagation through the inner loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaopt.differentiate.base import InnerLoop, unroll
from metaopt.kernels import any_order
from metaopt.scan import Memory, check_memory
from metaopt.tree import Tree


@dataclass(frozen=True)
class Backprop:
    """Exact adjoint of the steps taken, with second derivatives of the loss.

    For w_{t+1} = w_t + u(grad L(w_t), s_t, w_t): the derivative of everything the loop returns with respect to the initial
    parameters and optimizer state, the optimizer's parameters and tensors, `meta`, and floating-point batches.

    Args:
        memory: "full" keeps the graph of every step: fastest for a handful of steps, and an outer compile sees through it.
            "steps" keeps the parameters and the optimizer state of each step and rebuilds one step at a time on the way back.
            `Revolve(snapshots)` keeps few of these states and recomputes the others with the fewest possible steps.

    Cost:
        2 to 4 gradients a step in time, one more for "steps". Memory: "full" T graphs, "steps" T states and one graph.

    Reference:
        Maclaurin, Duvenaud, Adams 2015, arXiv:1502.03492; Franceschi et al. 2017, arXiv:1703.01785, section 3.1.
    """

    memory: Memory = "full"

    def __post_init__(self) -> None:
        check_memory(self.memory)

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tensor]:
        def gradient(inputs: Tree, params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
            with any_order():
                return torch.func.grad_and_value(lambda at: loop.loss(inputs, at, batch))(params)

        return unroll(loop, gradient, self.memory)
