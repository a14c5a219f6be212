"""Generalised minimal residuals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.linear_solve.base import IterativeSolver, Operator, all_done, divide


@dataclass(frozen=True)
class GMRES(IterativeSolver):
    """Solve A x = b for any A, minimising |b - A x| over the Krylov space.

    Exact after n steps in n dimensions, for every regular A. Not restarted: `max_steps` bounds its
    memory.

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end.
        damping: added to A's diagonal.

    Cost:
        One product a step, one more with a start; max_steps + 2 vectors.

    Reference:
        Saad, Schultz 1986, SIAM J. Sci. Stat. Comput. 7(3).
    """

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, r, steps = self._begin(operator, b, start)
        k = self.max_steps
        residual = tree.norm(r)
        basis = [divide(r, residual)]
        # With A V_k = V_{k+1} H, the least squares min |residual e_1 - H y| become triangular by
        # one rotation a step: Q H = R.
        identity = torch.eye(k + 1, dtype=b.dtype, device=b.device)
        Q = list(identity)  # its rows
        R: list[Tensor] = []  # its columns
        g: list[Tensor] = []  # Q residual e_1
        rest = residual  # of g, with its sign
        for j in range(k):
            active = self._unsolved(rest.abs())
            if all_done(active):
                break
            product = operator(basis[j])
            h, direction = _orthogonalized(product, torch.stack(basis))
            length = tree.norm(direction)
            noise = 10 * torch.finfo(b.dtype).eps * tree.norm(product)
            length = torch.where(length > noise, length, 0)
            basis.append(divide(direction, length))
            column = [q[: j + 1] @ h for q in Q[: j + 1]]
            radius = tree.safe_sqrt(column[j].square() + length.square())
            active = active & (radius > noise)
            cosine, sine = (
                torch.where(active, divide(part, radius), one)
                for part, one in ((column[j], 1.0), (length, 0.0))
            )
            Q[j], Q[j + 1] = cosine * Q[j] + sine * Q[j + 1], cosine * Q[j + 1] - sine * Q[j]
            # Where nothing is left to do, the column is e_j and the right-hand side 0: y_j = 0.
            column[j] = torch.where(active, radius, 1)
            R.append(torch.cat([torch.stack(column), torch.zeros_like(identity[0, j + 1 :])])[:k])
            g.append(torch.where(active, cosine * rest, 0))
            rest = torch.where(active, -sine * rest, rest)
            steps = steps + active
        if g:
            made = len(g)
            triangle = torch.stack(R, 1)[:made]
            y = torch.linalg.solve_triangular(triangle, torch.stack(g)[:, None], upper=True)[:, 0]
            x = x + y @ torch.stack(basis[:made])
        return x, rest.abs(), steps


def _orthogonalized(vector: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the coefficients of `vector` in the orthonormal rows of `basis`, and what is left.

    They are computed twice, for full precision.
    """
    first = basis @ vector
    left = vector - first @ basis
    second = basis @ left
    return first + second, left - second @ basis
