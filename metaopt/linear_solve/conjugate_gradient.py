"""Conjugate gradients, with or without a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.linear_solve.base import IterativeSolver, Operator, all_done, divide


@dataclass(frozen=True)
class ConjugateGradient(IterativeSolver):
    """Solve A x = b for symmetric positive definite A.

    The error in the norm x'Ax is minimal over the Krylov space. Exact after n steps in n
    dimensions; after k steps the error has fallen by 2 ((sqrt(c) - 1) / (sqrt(c) + 1))^k at least,
    with the condition number c. A Hessian with negative eigenvalues needs `damping` above the
    largest of them, or `NormalCG`.

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end.
        damping: added to A's diagonal. iMAML's regularised Hessian I + H / lam is, up to the factor
            lam, damping lam.

    Cost:
        One product a step, one more with a start; 4 vectors.

    Reference:
        Hestenes, Stiefel 1952; for hypergradients Pedregosa 2016, arXiv:1602.02355, and Rajeswaran
        et al. 2019, arXiv:1909.04630.
    """

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._preconditioned(operator, b, start, lambda r: r)

    def _preconditioned(
        self, operator: Operator, b: Tensor, start: Tensor | None, precondition: Operator
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the method in the inner product of the preconditioner M^-1, given as r -> M^-1 r."""
        x, r, steps = self._begin(operator, b, start)
        z = p = precondition(r)
        rz = r @ z
        for _ in range(self.max_steps):
            active = self._unsolved(tree.norm(r))
            if all_done(active):
                break
            Ap = operator(p)
            alpha = torch.where(active, divide(rz, p @ Ap), 0)
            x, r = x + alpha * p, r - alpha * Ap
            z, before = precondition(r), rz
            rz = r @ z
            p = z + divide(rz, before) * p
            steps = steps + active
        return x, tree.norm(r), steps
