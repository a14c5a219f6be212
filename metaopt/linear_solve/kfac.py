"""The inverse of Kronecker-factored curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_positive
from metaopt.linear_solve.base import LinearSolver, Operator, Solution
from metaopt.linear_solve.kronecker import KroneckerFactors
from metaopt.tree import Tree


@dataclass(frozen=True)
class KFAC(LinearSolver):
    """Solve (K + damping I) x = b with Kronecker-factored curvature K in place of A.

    With the eigenvectors of a layer's factors, its part of x is U_G [(U_G' B U_A) / (S + damping)]
    U_A'. A itself is looked at for the residual alone. Where A is a Hessian, K lacks what is
    between layers and the curvature of the model itself (it is that of its linearization, never
    negative); `KFACCG` takes K as a preconditioner, and solves with A.

        factors = mo.KroneckerFactors(net, net.params, x)
        w = mo.implicit(loss_fn, net.params, batch, meta=weights, solver=mo.KFAC(factors))

    Args:
        factors: K, taken at the solution. It stays as it is: make it anew where parameters moved.
        damping: positive. It matters: directions without curvature are divided by it.

    Raises:
        ValueError: b has another structure than the parameters of `factors`.

    Cost:
        Four products of matrices of a layer's size a layer, and one product with A for the
        residual.

    Reference:
        Martens, Grosse 2015, arXiv:1503.05671, section 6.3 (there the damping is split between the
        factors; here it is added to the product); for hypergradients Liao, Dangel, Yu 2026,
        arXiv:2603.29108.
    """

    factors: KroneckerFactors
    damping: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "damping", self.damping)
        check_factors(self, self.factors)

    def __call__(
        self, matvec: Callable[[Tree], Tree], b: Tree, *, start: Tree | None = None
    ) -> Solution:
        tree.leaves_like(self.factors.like, b, "b")
        return super().__call__(matvec, b, start=start)

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.factors.solve(b, self.damping)
        return x, tree.norm(b - operator(x)), torch.ones_like(b[0], dtype=torch.int64)


def check_factors(owner: object, factors: object) -> None:
    """Raise TypeError unless these are `KroneckerFactors`."""
    if not isinstance(factors, KroneckerFactors):
        raise TypeError(
            f"{type(owner).__name__}: `factors` must be Kronecker factors, got {factors!r}. Write "
            "`KroneckerFactors(net, net.params, x)`."
        )
