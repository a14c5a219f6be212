"""The Nystrom approximation by columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count, check_positive
from metaopt.linear_solve.base import (
    LinearSolver,
    Operator,
    products,
    seeded_places,
)


@dataclass(frozen=True)
class Nystrom(LinearSolver):
    """Solve (H_K' W^+ H_K + rho I) x = b without iterations.

    H_K are `rank` rows of a symmetric H, and W = H_KK is their block. With C = H_K' = Q R and M = R
    W^+ R', x = Q (M + rho I)^-1 Q'b + (b - Q Q'b) / rho: the same as the paper's Woodbury formula b
    / rho - C (W + C'C / rho)^-1 C'b / rho^2, which squares the condition number. What the columns
    miss counts as 0, so the error there is a factor rho / (rho + eigenvalue); with all n columns x
    = (H + rho I)^-1 b.

    Args:
        rank: number of columns, at most n of which are used.
        seed: of the choice of columns, uniform without replacement.
        damping: rho, positive. It matters: too small blows up what the columns miss.

    Cost:
        `rank` products batched by `vmap` and one for the residual; 2 rank vectors.

    Reference:
        Hataya, Yamada 2023, arXiv:2302.09726, equations 4 to 6.
    """

    rank: int = 10
    seed: int = 0
    damping: float = field(default=0.01, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "damping", self.damping)
        check_count(self, "rank", self.rank)

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        n, rho = len(b), self.damping
        rank = min(self.rank, n)
        places = seeded_places(n, rank, self.seed).to(b.device)
        units = torch.nn.functional.one_hot(places, n).to(b.dtype)
        C = (products(operator, units) - rho * units).T
        W = C[places]
        Q, R = torch.linalg.qr(C)
        M = R @ torch.linalg.pinv((W + W.T) / 2, hermitian=True) @ R.T
        projected = Q.T @ b
        inside = torch.linalg.solve(
            M + rho * torch.eye(rank, dtype=b.dtype, device=b.device), projected
        )
        x = Q @ inside
        if rank < n:
            # What Q does not span, projected out twice: once leaves rounding, divided by rho then.
            outside = b - Q @ projected
            x = x + (outside - Q @ (Q.T @ outside)) / rho
        return x, tree.norm(b - operator(x)), torch.ones_like(b[0], dtype=torch.int64)
