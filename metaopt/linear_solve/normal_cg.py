"""Conjugate gradients on the normal equations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.linear_solve.base import IterativeSolver, Operator, all_done, divide


@dataclass(frozen=True)
class NormalCG(IterativeSolver):
    """Solve A'A x = A'b for any A, indefinite or not symmetric.

    |b - A x| is minimal over the Krylov space of A'A. A' comes from the vjp of the product. If A is
    singular, x tends to a least-squares solution. The condition number is squared, so expect about
    as many more steps.

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end.
        damping: added to A's diagonal (not to that of A'A).

    Cost:
        One product with A and one with A' a step, and two more; 4 vectors and A's graph.

    Reference:
        Hestenes, Stiefel 1952, section 10; Saad 2003, Iterative Methods for Sparse Linear Systems,
        algorithm 8.4 (CGNR).
    """

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, pullback, *_ = torch.func.vjp(operator, torch.zeros_like(b))

        def transposed(y: Tensor) -> Tensor:
            (found,) = pullback(y)
            assert isinstance(found, Tensor)
            return found

        x, r, steps = self._begin(operator, b, start)
        s = p = transposed(r)
        ss = s @ s
        for _ in range(self.max_steps):
            active = self._unsolved(tree.norm(r))
            if all_done(active):
                break
            Ap = operator(p)
            alpha = torch.where(active, divide(ss, Ap @ Ap), 0)
            x, r = x + alpha * p, r - alpha * Ap
            s, before = transposed(r), ss
            ss = s @ s
            p = s + divide(ss, before) * p
            steps = steps + active
        return x, tree.norm(r), steps
