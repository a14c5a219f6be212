"""A bilevel problem of which the hypergradient is known in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

DTYPE = torch.float64  # in which a condition number of 1e4 leaves twelve digits


class Quadratic(NamedTuple):
    """1/2 z'Az + 1/2 x'Bx + x'Cz + a'z + b'x, for z below and x above."""

    A: Tensor
    B: Tensor
    C: Tensor
    a: Tensor
    b: Tensor

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ (self.A @ z / 2 + self.C.T @ x + self.a) + x @ (self.B @ x / 2 + self.b)


@dataclass(frozen=True)
class Bilevel:
    """One hypergradient of a bilevel problem of quadratics, at the solution below, in float64.

    As in the benchmark of Dagreou, Ablin, Vaiter, Moreau 2022, arXiv:2201.13409: eigenvalues of the
    Hessians and singular values of the cross terms evenly spaced in their logarithm, in random
    bases. Theirs are means over samples, which have these spectra on average; these have them
    exactly. Conjugate gradients, Neumann series and backpropagation make the same number of
    products with the inner Hessian; other solvers end at a relative residual of 1e-9.
    """

    condition: float  # of the inner Hessian, whose largest eigenvalue is 1
    products: int
    inner: int = 1000
    outer: int = 100
    cross: float = 0.1  # largest singular value of the cross terms
    rank: int = 200  # of approximations
    window: int = 10  # steps of truncated backpropagation
    lr: float = 1.0
    outer_lr: float = 1e-3

    def data(self) -> tuple[Quadratic, Quadratic, Tensor, Tensor]:
        """Return the losses below and above, the solution z*(x) [inner], and x [outer]."""
        generator = torch.Generator().manual_seed(1)
        lower, upper = self._draw(generator), self._draw(generator)
        x = torch.randn(self.outer, generator=generator, dtype=DTYPE)
        return lower, upper, torch.linalg.solve(lower.A, -lower.C.T @ x - lower.a), x

    def exact(self) -> dict[str, Tensor]:
        """Return the hypergradient d_x F - C A^-1 d_z F, "w" as in `Vector`."""
        lower, upper, z, x = self.data()
        slope = upper.A @ z + upper.C.T @ x + upper.a
        direct = upper.B @ x + upper.C @ z + upper.b
        return {"w": direct - lower.C @ torch.linalg.solve(lower.A, slope)}

    def _draw(self, generator: torch.Generator) -> Quadratic:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=DTYPE)

        def basis(rows: int, columns: int) -> Tensor:
            return torch.linalg.qr(normal(rows, columns))[0]

        def spectrum(largest: float, size: int) -> Tensor:
            low, high = -math.log10(self.condition), math.log10(largest)
            return torch.logspace(low, high, size, dtype=DTYPE)

        n, m = self.inner, self.outer
        below, above = basis(n, n), basis(m, m)
        left, right = basis(m, m), basis(n, m)
        flat = torch.cat([torch.zeros(1, dtype=DTYPE), spectrum(1.0, m - 1)])  # one direction is
        return Quadratic(
            below * spectrum(1.0, n) @ below.T,
            above * flat @ above.T,
            left * spectrum(self.cross, m) @ right.T,
            normal(n),
            normal(m),
        )
