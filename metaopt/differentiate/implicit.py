"""Implicit differentiation at the end of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.differentiate.base import InnerLoop, unroll
from metaopt.implicit import implicit
from metaopt.kernels import any_order
from metaopt.linear_solve import ConjugateGradient, LinearSolver
from metaopt.stream import last_row
from metaopt.transforms import tracking_levels
from metaopt.tree import Tree


@dataclass(frozen=True)
class Implicit:
    """The derivative of a solution w* of grad_w L(w, inputs) = 0, whatever the steps that led there.

    For a cotangent v on the last parameters: x = H^-1 v with the Hessian H = grad^2_ww L there, and -[d grad_w L]' x goes to what
    the loss reads: `meta`, the loss's own parameters, the batch. With a batch per step, L is the loss on the last one; the rows
    before it receive nothing.

    A solution does not depend on where the search for it starts, nor on the optimizer: the initial parameters and state,
    and the optimizer's parameters, receive nothing (autograd then says "not used in the graph"). For iMAML give the initial
    parameters as `meta` too, and let the loss keep the solution near them. The returned optimizer state and losses are constants.

    The loss must not be random: the Hessian and the mixed product are evaluated separately, with other dropout masks.

    The result can be differentiated any number of times, and be a middle level: see `metaopt.implicit`. With the solver exact,
    the hypergradient's error is of the order of |w - w*|, the distance to the solution.

    Args:
        solver: of the systems H x = v. Away from a minimum H may be indefinite: use `damping`, `NormalCG` or `GMRES`.

    Raises:
        ValueError: `torch.func.grad` differentiates initial parameters, or the optimizer's tensors, that the loss does not
            read: its answer would be zeros. Also under `torch.compile` while gradients are enabled.

    Cost:
        The loop without a graph, then one Hessian product a product of the solver, and one mixed product.

    Reference:
        Rajeswaran, Finn, Kakade, Levine 2019, arXiv:1909.04630, lemma 1; Lorraine, Vicol, Duvenaud 2020, arXiv:1911.02590,
        theorem 1.
    """

    solver: LinearSolver = field(default_factory=ConjugateGradient)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"Implicit: `solver` must be a linear solver, got {self.solver!r}. Use for example "
                "`Implicit(ConjugateGradient(max_steps=20))`."
            )

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tensor]:
        read = {name: part for name, part in loop.inputs.items() if name != "optimizer"}
        _refuse_zeros("initial parameters", loop.params, read)
        _refuse_zeros("optimizer's tensors", loop.inputs["optimizer"], read)

        def gradient(inputs: Tree, params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
            with any_order():
                return torch.func.grad_and_value(lambda at: loop.loss(inputs, at, batch))(params)

        inputs, params, state, batches = tree.map(_detached, (loop.inputs, loop.params, loop.state, loop.batches))
        with torch.no_grad():
            found = unroll(replace(loop, inputs=inputs, params=params, state=state, batches=batches), gradient, "full")
        params, state, losses = tree.map(torch.Tensor.detach, found)
        optimizer = inputs["optimizer"]

        def residual(w: Tree, given: tuple[Tree, Tree]) -> Tree:
            read, batch = given
            return gradient({**read, "optimizer": optimizer}, w, batch)[0]

        return implicit(residual, self.solver, params, (read, last_row(loop.batches))), state, losses


def _refuse_zeros(what: str, tensors: Tree, read: Tree) -> None:
    """Raise if `torch.func.grad` asks for the derivative in tensors that are not among those the loss reads."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return
    known = {id(leaf) for leaf in tree.leaves(read)}
    for name, leaf in tree.named_leaves(tensors):
        if id(leaf) not in known and isinstance(leaf, Tensor) and tracking_levels(leaf) - {0}:
            raise ValueError(
                f"Implicit: the {what} must not be differentiated by `torch.func.grad`, but {name} (shape {tuple(leaf.shape)}) is. "
                "A solution does not depend on them, so the answer would be zeros. Detach them, or, as in iMAML, pass the same "
                "tensors as `meta` and let the loss depend on them."
            )


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
