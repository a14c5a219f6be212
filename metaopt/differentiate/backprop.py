"""Backpropagation through the inner loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
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
        window: differentiate only through the last so many steps; by default through all. The steps before are constants:
            nothing reaches the initial parameters and state, and their losses. The error decays like (1 - lr mu)^window
            where the loss has curvature mu or more.

    Raises:
        ValueError: an unknown memory, or a window that is not positive.

    Cost:
        2 to 4 gradients a step in time, one more for "steps". Memory: "full" T graphs, "steps" T states and one graph.

    Reference:
        Maclaurin, Duvenaud, Adams 2015, arXiv:1502.03492; Franceschi et al. 2017, arXiv:1703.01785, section 3.1;
        window: Shaban, Cheng, Hatch, Boots 2019, arXiv:1810.10667, proposition 3.1.
    """

    memory: Memory = "full"
    window: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_memory(self.memory)
        if self.window is not None and (isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"Backprop: `window` must be a positive integer or None, got {self.window!r}.")

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tensor]:
        def gradient(inputs: Tree, params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
            with any_order():
                return torch.func.grad_and_value(lambda at: loop.loss(inputs, at, batch))(params)

        def update(inputs: Tree, grads: Tree, state: Any, params: Tree, loss: Tensor) -> tuple[Tree, Any]:
            with any_order():  # a learned optimizer may hold norms and recurrent layers too
                return loop.update(inputs, grads, state, params, loss)

        exact = replace(loop, update=update)
        constant = 0 if self.window is None else max(loop.steps - self.window, 0)
        if constant == 0:
            return unroll(exact, gradient, self.memory)
        early, late = (tree.index(loop.batches, part) for part in (slice(constant), slice(constant, None)))
        with torch.no_grad():
            start = unroll(replace(exact, batches=early, steps=constant), gradient, "full")
        params, state, before = tree.map(torch.Tensor.detach, start)
        rest = replace(exact, params=params, state=state, batches=late, steps=loop.steps - constant)
        params, state, losses = unroll(rest, gradient, self.memory)
        return params, state, torch.cat([before, losses])
