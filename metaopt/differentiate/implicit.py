"""Implicit differentiation at the end of the inner loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from metaopt.autodiff.implicit import pull_back_implicit
from metaopt.differentiate.point import End, PointRule, Read, add_optimizer, read_by_loss
from metaopt.differentiate.protocol import InnerLoop
from metaopt.linear_solve import ConjugateGradient, LinearSolver
from metaopt.tree import Tree


@dataclass(frozen=True)
class Implicit(PointRule):
    """The derivative of a solution w* of grad_w L(w, inputs) = 0, however it was found.

    For a cotangent v on the last parameters: x = H^-1 v with the Hessian H = grad^2_ww L there, and
    -[d grad_w L]' x goes to what the loss reads: `meta`, the loss's own parameters, the batch. With
    a batch per step, L is the loss on the last one; the rows before it receive nothing.

    A solution does not depend on where the search for it starts, nor on the optimizer: the initial
    parameters and state, and the optimizer's parameters, receive nothing; where nothing else is
    differentiated, that is an error. For iMAML give the initial parameters as `meta` too, and let
    the loss keep the solution near them. The returned optimizer state and losses are constants.

    A random loss is seen with one set of random numbers (one dropout mask), those that would be
    drawn after the loop.

    The result can be differentiated any number of times, and be a middle level: see
    `metaopt.autodiff.implicit`. With the solver exact, the hypergradient's error is of the order of
    |w - w*|, the distance to the solution.

    Args:
        solver: of the systems H x = v. Away from a minimum H may be indefinite: use `damping`,
            `NormalCG` or `GMRES`.

    Raises:
        ValueError: what is differentiated are initial parameters or state, or the optimizer's
            tensors, that the loss does not read: the answer would be zeros. Also under
            `torch.compile` while gradients are enabled.

    Cost:
        The loop without a graph, then one Hessian product a product of the solver, and one mixed
        product.

    Reference:
        Rajeswaran, Finn, Kakade, Levine 2019, arXiv:1909.04630, lemma 1; Lorraine, Vicol, Duvenaud
        2020, arXiv:1911.02590, theorem 1.
    """

    solver: LinearSolver = field(default=ConjugateGradient())

    def __post_init__(self) -> None:
        if not isinstance(self.solver, LinearSolver):
            raise TypeError(
                f"Implicit: `solver` must be a linear solver, got {self.solver!r}. Use for example "
                "`Implicit(ConjugateGradient(max_steps=20))`."
            )

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        # constants of the theorem, not of what is around it: explicit too
        fixed = (loop.inputs, end.state)

        def residual(w: Tree, given: tuple[Any, Tree, Tree]) -> Tree:
            read, batch, (inputs, state) = given
            grads, _, _ = loop.gradient(add_optimizer(read, inputs), w, state, batch)
            return grads

        given = (read_by_loss(loop.inputs), end.batch, fixed)
        in_given = (*wanted, False)
        bars, solution = pull_back_implicit(
            residual, self.solver, end.params, given, cotangent, in_given
        )
        return bars[:2], {"residual": solution.residual, "steps": solution.steps}
