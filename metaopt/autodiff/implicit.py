"""The implicit function theorem: the derivative of w where F(w, inputs) = 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.derivative import with_derivative
from metaopt.autodiff.plain import stands_in
from metaopt.autodiff.pullback import Linearized, choose, pull_back
from metaopt.autodiff.replay import drawn_again
from metaopt.linear_solve import LinearSolver, Solution
from metaopt.transforms import is_unrecorded
from metaopt.tree import Tree

Residual = Callable[[Tree, Tree], Tree]  # F: (w, inputs) -> a tree like w


def implicit(residual: Residual, solver: LinearSolver, w: Tree, inputs: Tree) -> Tree:
    """Return w with the derivative -(d_w F)^-1 d_inputs F that F(w, inputs) = 0 gives it.

    The value of F is never looked at: away from a root this is the derivative of one Newton step.
    Reverse mode only, of any order: with x = (d_w F)'^-1 v, the backward pass is a function of w
    and x, and both are such solutions again, x of the linear F(x) = (d_w F)' x - v. So a second
    derivative costs more linear systems, but nothing is unrolled. A solver's damping belongs to the
    map that is differentiated.

    Args:
        residual: F, a function of its arguments alone; what it reaches otherwise is constant.
        solver: of the linear systems with (d_w F)'.
        w: the solution, a tree of floating-point tensors; a constant.
        inputs: a tree; its floating-point tensors are differentiated.

    Raises:
        ValueError: under `torch.compile` while gradients are enabled.

    Cost:
        In the backward pass one vjp of F a product of the solver, and one vjp for the inputs.

    Reference:
        Krantz, Parks 2013, The Implicit Function Theorem; Blondel et al. 2022, arXiv:2105.15183,
        equation 2.
    """

    def transposed(w: Tree, inputs: Tree, cotangent: Tree, wanted: Tree) -> Tree:
        bars, _ = pull_back_implicit(residual, solver, w, inputs, cotangent, wanted)
        return bars

    return with_derivative(transposed, w, inputs)


def pull_back_implicit(
    residual: Residual,
    solver: LinearSolver,
    w: Tree,
    inputs: Tree,
    cotangent: Tree,
    wanted: Tree,
    *,
    start: Tree | None = None,
) -> tuple[Tree, Solution]:
    """Return (-(d_inputs F)' x, x) for the solution x of (d_w F)' x = v; differentiable again.

    A random F draws the same numbers in the linear system and in the product, but for a compiled
    one, which cannot.

    Args:
        residual: F.
        solver: of the linear system.
        w: the solution of F(w, inputs) = 0.
        inputs: a tree.
        cotangent: v, a tree like w.
        wanted: a tree of bools like inputs, or with one for a whole part: whether the cotangent of
            these floating-point tensors is asked for.
        start: where the solver begins, a tree like w.

    Returns:
        The cotangents of the inputs, with None for what is not wanted, and what the solver says.

    Raises:
        ValueError: under `torch.compile` while gradients are enabled. Without them it can be
            compiled.
    """
    # one evaluation of F for the solver and the product
    if is_unrecorded() and stands_in(choose((w, inputs), (True, wanted))):
        at_point = Linearized(residual, (w, inputs), (True, wanted))
        solution = solver(lambda x: at_point.pull_back(x, 0), cotangent, start=start)
        return at_point.pull_back(tree.map(torch.neg, solution.value), 1, keep=False), solution

    def transposed(x: Tree, point: tuple[Tree, Tree, Tree]) -> Tree:
        """Return (d_w F)' x - v; only its derivatives are of use, in which v counts as -I."""
        w, inputs, v = point
        (product,) = pull_back(lambda w: residual(w, inputs), (w,), x, (True,))
        return tree.map(torch.sub, product, v)

    at, fixed, v = tree.map(_detached, (w, inputs, cotangent))
    # the solution's derivative is not that of the solver's steps
    with drawn_again(w, inputs), torch.no_grad():
        solution = solver(_transposed(lambda w: residual(w, fixed), at), v, start=start)
    x = implicit(transposed, solver, solution.value, (w, inputs, cotangent))
    _, bars = pull_back(residual, (w, inputs), tree.map(torch.neg, x), (False, wanted))
    return bars, solution._replace(value=x)


def _transposed(function: Callable[[Tree], Tree], at: Tree) -> Callable[[Tree], Tree]:
    """Return x -> (d_w F)' x, having evaluated F once."""
    if stands_in(tree.leaves(at)):
        at_point = Linearized(function, (at,), (True,))
        return lambda x: at_point.pull_back(x, 0)
    _, pull, *_ = torch.func.vjp(function, at)
    return lambda x: pull(x)[0]


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
