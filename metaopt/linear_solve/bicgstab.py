"""Stabilised biconjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.linear_solve.base import IterativeSolver, Operator, all_done, divide


@dataclass(frozen=True)
class BiCGStab(IterativeSolver):
    """Solve A x = b for any A in short recurrences, without A'.

    Exact after n steps in n dimensions unless it breaks down; it then stays where it is, which the
    residual tells. The residual need not fall from step to step; `GMRES` is safer where its memory
    is at hand.

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end.
        damping: added to A's diagonal.

    Cost:
        Two products a step, one more with a start; 7 vectors.

    Reference:
        van der Vorst 1992, SIAM J. Sci. Stat. Comput. 13(2).
    """

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, r, steps = self._begin(operator, b, start)
        shadow, p, rho = r, r, r @ r
        for _ in range(self.max_steps):
            active = self._unsolved(tree.norm(r))
            if all_done(active):
                break
            Ap = operator(p)
            alpha = torch.where(active, divide(rho, shadow @ Ap), 0)
            s = r - alpha * Ap
            As = operator(s)
            omega = torch.where(active, divide(As @ s, As @ As), 0)
            x, r = x + alpha * p + omega * s, s - omega * As
            before, rho = rho, shadow @ r
            p = r + divide(rho, before) * divide(alpha, omega) * (p - omega * Ap)
            steps = steps + active
        return x, tree.norm(r), steps
