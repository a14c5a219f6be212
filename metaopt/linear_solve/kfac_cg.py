"""Conjugate gradients with Kronecker-factored curvature as the preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from metaopt import tree
from metaopt.checks import check_positive
from metaopt.linear_solve.base import Operator, Solution
from metaopt.linear_solve.conjugate_gradient import ConjugateGradient
from metaopt.linear_solve.kfac import check_factors
from metaopt.linear_solve.kronecker import KroneckerFactors
from metaopt.tree import Tree


@dataclass(frozen=True)
class KFACCG(ConjugateGradient):
    """Solve (A + damping I) x = b for positive definite A + damping I, preconditioned by `KFAC`.

    After a single step x is a multiple of what `KFAC` gives, the best one for this A; more steps
    add what the factors lack.

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end.
        factors: as for `KFAC`.
        damping: positive; added to the diagonals of A and of the preconditioner.

    Raises:
        ValueError: b has another structure than the parameters of `factors`.

    Cost:
        That of `ConjugateGradient`, and four products of matrices of a layer's size a layer a step.

    Reference:
        Martens, Grosse 2015, arXiv:1503.05671, for the factors; Hestenes, Stiefel 1952.
    """

    factors: KroneckerFactors = field(kw_only=True)
    damping: float = field(default=1e-3, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
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
        return self._preconditioned(
            operator, b, start, lambda r: self.factors.solve(r, self.damping)
        )
