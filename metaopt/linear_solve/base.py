"""What the solvers share: from trees to vectors of unit length and back, damping, tolerance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count, check_positive
from metaopt.torch_internals import mark_constant_when_compiled
from metaopt.transforms import outside_transforms, values_are_readable
from metaopt.tree import Tree

Operator = Callable[[Tensor], Tensor]  # [n] -> [n], linear


class Solution(NamedTuple):
    """What a solver returns.

    Attributes:
        value: x, a tree like b.
        residual: |b - (A + damping I) x| / |b|, a scalar; 0 for b = 0. The Krylov methods know it
            from their recurrences, which in finite precision can be too optimistic by cond(A) eps.
        steps: iterations made, int64. Under `vmap` each element has its own.
    """

    value: Tree
    residual: Tensor
    steps: Tensor


@dataclass(frozen=True)
class LinearSolver(ABC):
    """A solver of (A + damping I) x = b on trees: `solver(matvec, b, start=None) -> Solution`.

    Subclasses see vectors: all leaves in a row, divided by |b|, so that no result depends on the
    scale of b and none of the squares underflows. Everything is deterministic, works under `vmap`
    (each element stops by itself), `torch.func.grad` and `torch.compile`. Where values can be read,
    iterations end with the last element's; elsewhere all `max_steps` are made, and what has
    converged stays as it is.

    Args:
        damping: added to the operator's diagonal.
    """

    damping: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "damping", self.damping, or_zero=True)

    def __call__(
        self, matvec: Callable[[Tree], Tree], b: Tree, *, start: Tree | None = None
    ) -> Solution:
        """Solve (A + damping I) x = b.

        Args:
            matvec: x -> A x, linear, from trees like b to trees like b.
            b: the right-hand side, a tree of floating-point tensors.
            start: where to begin, a tree like b; by default zero. Direct methods have no use for
                it.

        Raises:
            ValueError: `start`, or what `matvec` returns, has another structure than b.
        """

        def operator(x: Tensor) -> Tensor:
            product = matvec(tree.unravel(x, b))
            tree.leaves_like(b, product, "matvec(x)")
            return tree.ravel(product) + self.damping * x if self.damping else tree.ravel(product)

        vector = tree.ravel(b)
        scale = _length(vector.detach())
        unit = divide(vector, scale)
        begin = None
        if start is not None:
            tree.leaves_like(b, start, "start")
            begin = divide(tree.ravel(start), scale)
        x, residual, steps = self._solve(operator, unit, begin)
        return Solution(tree.unravel(x * scale, b), torch.where(scale > 0, residual, 0), steps)

    @abstractmethod
    def _solve(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x [n], |b - A x|, steps) for |b| = 1, or b = 0, and the damped operator A."""


@dataclass(frozen=True)
class IterativeSolver(LinearSolver):
    """A solver that ends when |b - (A + damping I) x| <= rtol |b|.

    Args:
        max_steps: iterations at most.
        rtol: relative residual at which to end; not below the precision of the numbers, where steps
            only add noise.
        damping: added to the operator's diagonal.
    """

    max_steps: int = 20
    rtol: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "max_steps", self.max_steps)
        check_positive(self, "rtol", self.rtol, or_zero=True)

    def _begin(
        self, operator: Operator, b: Tensor, start: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x, b - A x, 0 steps)."""
        zero = torch.zeros_like(b[0], dtype=torch.int64)
        return (
            (torch.zeros_like(b), b, zero) if start is None else (start, b - operator(start), zero)
        )

    def _unsolved(self, residual: Tensor) -> Tensor:
        """Return True where the norm of the residual asks for another step."""
        return residual > max(self.rtol, torch.finfo(residual.dtype).eps)


def all_done(active: Tensor) -> bool:
    """Return True if it is known that no element has anything left to do."""
    return values_are_readable() and not active.any()


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient, 0 where the denominator is 0.

    A method that breaks down then stays where it is.
    """
    regular = denominator != 0
    return torch.where(regular, numerator / torch.where(regular, denominator, 1), 0)


def products(operator: Operator, rows: Tensor) -> Tensor:
    """Return A r for each row r of [k, n], as rows, batched by `vmap`.

    Randomness inside A is one and the same for all.
    """
    return torch.func.vmap(operator, randomness="same")(rows)


def seeded_normal(n: int, k: int, seed: int) -> Tensor:
    """Return standard normal numbers [n, k], float64, the same ones for the same arguments.

    They are the same under every transform.
    """
    return _drawn(
        lambda generator: torch.randn(n, k, dtype=torch.float64, generator=generator), seed
    )


def seeded_places(n: int, k: int, seed: int) -> Tensor:
    """Return k of the numbers 0, ..., n - 1, the same ones for the same arguments.

    They are the same under every transform.
    """
    return _drawn(lambda generator: torch.randperm(n, generator=generator)[:k], seed)


@mark_constant_when_compiled
def _drawn(draw: Callable[[torch.Generator], Tensor], seed: int) -> Tensor:
    """Draw outside of all transforms.

    `vmap` would refuse, or draw one per element; a compiler keeps the numbers.
    """
    with outside_transforms():
        return draw(torch.Generator().manual_seed(seed))


def _length(vector: Tensor) -> Tensor:
    """Return |vector| without underflow or overflow of the squares."""
    largest = vector.abs().amax()
    return largest * (vector / torch.where(largest > 0, largest, 1)).square().sum().sqrt()
