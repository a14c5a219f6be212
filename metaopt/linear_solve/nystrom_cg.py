"""Conjugate gradients with a randomized Nystrom preconditioner."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.linear_solve.base import Operator, products, seeded_normal
from metaopt.linear_solve.conjugate_gradient import ConjugateGradient
from metaopt.transforms import values_are_readable


@dataclass(frozen=True)
class NystromCG(ConjugateGradient):
    """Solve (A + mu I) x = b for positive semidefinite A by preconditioned conjugate gradients.

    The preconditioner is a sketch of A. With an orthonormal random Omega [n, rank] and Y = A Omega,
    the sketch is Y (Omega'Y)^-1 Y' = U L U', and the preconditioner P^-1 = U (l_rank + mu) (L +
    mu)^-1 U' + (I - U U') flattens the `rank` largest eigenvalues: the condition number left is
    about (l_rank + mu) / (smallest + mu).

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end.
        rank: columns of the sketch; at most n of them are used.
        seed: of Omega.
        damping: mu, added to A's diagonal.

    Raises:
        ValueError: the sketch of A is not positive definite (where values can be read; elsewhere x
            is nan).

    Cost:
        `rank` products batched by `vmap`, then those of `ConjugateGradient`; rank + 4 vectors.

    Reference:
        Frangella, Tropp, Udell 2021, arXiv:2110.02820, algorithms 2.1 and 5.1. The shift nu that
        keeps the Cholesky factor stable is left in L, of which it is a relative change by some n
        eps.
    """

    rank: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "rank", self.rank)

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n = len(b)
        omega, _ = torch.linalg.qr(seeded_normal(n, min(self.rank, n), self.seed).to(b))
        Y = products(operator, omega.T).T - self.damping * omega
        nu = torch.finfo(b.dtype).eps * n**0.5 * Y.norm()
        Y = Y + nu * omega
        factor, info = torch.linalg.cholesky_ex(_symmetric(omega.T @ Y))
        if values_are_readable() and info > 0:
            raise ValueError(
                "NystromCG: the operator must be positive semidefinite, but its sketch has a "
                "negative eigenvalue. Conjugate gradients do not apply. Use `NormalCG` or `GMRES`, "
                "or put the damping into the operator."
            )
        factor = torch.where(
            info == 0, factor, torch.eye(len(factor), dtype=b.dtype, device=b.device)
        )
        B = torch.linalg.solve_triangular(factor, Y.T, upper=False).T
        U, singular, _ = torch.linalg.svd(B, full_matrices=False)
        eigenvalues = singular.square() + self.damping
        shrink = torch.where(info == 0, eigenvalues[-1] / eigenvalues - 1, torch.nan)
        return self._preconditioned(operator, b, start, lambda r: r + U @ (shrink * (U.T @ r)))


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2
