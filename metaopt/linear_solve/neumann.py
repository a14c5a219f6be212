"""The Neumann series."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count, check_positive
from metaopt.linear_solve.base import LinearSolver, Operator


@dataclass(frozen=True)
class Neumann(LinearSolver):
    """Approximate A^-1 b by eta sum_{i < terms} (I - eta A)^i b.

    Converges for eigenvalues in (0, 2 / eta); along an eigenvalue mu the relative error is exactly
    (1 - eta mu)^terms. With SGD's step size for eta it is what backpropagation through the last
    `terms` steps at a fixed point computes. It is linear in b, so noise in the products averages
    out.

    Args:
        step_size: eta; below 2 over the largest eigenvalue of A + damping I.
        terms: number of terms.
        damping: added to A's diagonal.

    Cost:
        `terms` products, the last one for the residual, and one more with a start; 3 vectors.

    Reference:
        Lorraine, Vicol, Duvenaud 2020, arXiv:1911.02590, equation 6 and algorithm 3.
    """

    step_size: float
    terms: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "step_size", self.step_size)
        check_count(self, "terms", self.terms)

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, r = (torch.zeros_like(b), b) if start is None else (start, b - operator(start))
        for _ in range(self.terms):
            x, r = x + self.step_size * r, r - self.step_size * operator(r)
        return x, tree.norm(r), torch.full_like(b[0], self.terms, dtype=torch.int64)
