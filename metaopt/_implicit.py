"""The derivative of a solution that any solver found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from metaopt import tree
from metaopt._functional import functional
from metaopt.checks import check_differentiable, check_scalar
from metaopt.closure import check_closure
from metaopt.differentiate import End, Implicit, InnerLoop, Inputs, PointRule
from metaopt.differentiate.point import read_by_loss
from metaopt.differentiate.refusal import attach_refusal, refuse_zeros
from metaopt.exact_ops import any_order
from metaopt.linear_solve import ConjugateGradient, LinearSolver
from metaopt.tree import Tree


def implicit(
    loss_fn: Callable[..., Tensor],
    solution: Tree,
    batch: Tree = None,
    *,
    meta: Tree = None,
    solver: LinearSolver | PointRule = ConjugateGradient(),  # noqa: B008
) -> Tree:
    """Return w with the derivative that grad_w L(w, batch, l) = 0 gives it.

    It is dw/dl = -H^-1 d_l grad_w L. w may come from anywhere: `torch.optim.LBFGS`, scipy,
    scikit-learn (made a tensor by `torch.as_tensor`). What `minimize` with `Implicit` does at the
    end of its own loop:

        solution = fit(weights.detach())  # any solver
        w = mo.implicit(loss_fn, solution, batch, meta=weights)
        validation_loss(w).backward()  # fills weights.grad

    Args:
        loss_fn: `loss_fn(params, batch)`, or `loss_fn(params, batch, meta)` if `meta` is given,
            returns the scalar L whose minimum (or other stationary point) w is. If it is an
            `nn.Module`, its trainable parameters are differentiated too.
        solution: w, a tree of floating-point tensors; a constant. How near grad_w L is to zero is
            not looked at: the derivative's error is of the order of the distance to the solution.
        batch: what the loss gets, None if it needs none; floating-point tensors are differentiated.
        meta: l, a tree of tensors.
        solver: of the systems H x = v with the Hessian of L in w; or a rule that puts something
            else for H^-1, such as `T1T2()`, `FiniteDifference()` or `Penalty()`.

    Returns:
        A tree like `solution`. It can be differentiated any number of times, under autograd,
        `torch.func.grad` and `vmap`.

    Raises:
        ValueError: `solution` holds something else; it is itself what is differentiated; the loss
            is not a scalar, or reaches a tensor that requires grad through its closure; a rule
            needs an optimizer (`SAMA`, `scale="lr"`).
        TypeError: `solver` is neither a linear solver nor a rule that looks at one point.

    Cost:
        One forward pass of the loss that looks for closures. On the way back that of the rule, see
        `Implicit`.

    Reference:
        Blondel et al. 2022, arXiv:2105.15183, equation 2.
    """
    if not isinstance(solver, LinearSolver | PointRule):
        raise TypeError(
            "implicit: `solver` must be a linear solver, or a rule that looks at one point, got "
            f"{solver!r}. Use for example `ConjugateGradient(max_steps=20)` or `Penalty()`."
        )
    check_differentiable("implicit", "solution", tree.named_leaves(solution))
    # A linear solver alone means the implicit function theorem.
    rule = solver if isinstance(solver, PointRule) else Implicit(solver)
    module = functional(loss_fn) if isinstance(loss_fn, nn.Module) else None
    inputs: Inputs = {
        "optimizer": {},
        "loss": {} if module is None else module.params,
        "meta": meta,
        "batch": batch,
    }

    def loss(inputs: Inputs, params: Tree, *_: Any) -> tuple[Tensor, tuple[()]]:
        arguments = [params, inputs["batch"]]
        if meta is not None:
            arguments.append(inputs["meta"])
        with any_order():
            value = loss_fn(*arguments) if module is None else module(inputs["loss"], *arguments)
        return check_scalar(value), ()

    def update(*_: Any) -> tuple[Tree, Any]:
        raise ValueError(
            f"implicit: `solver` must do without an optimizer, got {rule!r}, which asks for its "
            "update. Use a linear solver, `FiniteDifference(scale=...)` or `Penalty()`."
        )

    ignored, read = {"solution": solution}, read_by_loss(inputs)
    check_closure(lambda *given: loss(*given)[0], loss_fn, inputs, solution)
    refuse_zeros(rule, ignored, read)
    # A loop of no steps, which starts and ends at the solution.
    loop = InnerLoop(loss, update, inputs, solution, (), (), 0)
    return attach_refusal(rule, rule.attach_at(loop, End(solution, (), ())), ignored, read)
