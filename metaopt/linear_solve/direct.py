"""The dense solver."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.linear_solve.base import LinearSolver, Operator, products


@dataclass(frozen=True)
class Direct(LinearSolver):
    """Solve A x = b by LU of the whole matrix, with all blocks between leaves.

    Args:
        damping: added to A's diagonal.

    Raises:
        torch.linalg.LinAlgError: the matrix is singular.

    Cost:
        n products batched by `vmap`, n^2 numbers, n^3 operations.
    """

    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        matrix = products(operator, torch.eye(len(b), dtype=b.dtype, device=b.device)).T
        x = torch.linalg.solve(matrix, b)
        return x, tree.norm(b - matrix @ x), torch.ones_like(b[0], dtype=torch.int64)
