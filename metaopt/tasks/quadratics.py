"""Random quadratic functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.meta_training.task import Task


@dataclass(frozen=True)
class Quadratics:
    """L(w) = |W w - y|^2 with W [n, n] and y [n] from N(0, 1), and w_0 = 0.

    Args:
        dimension: n.
        functions: how many there are in one task, whose loss is their sum: w is [functions, n]
            then. To an optimizer that treats every coordinate alike this is as many tasks, at a
            third of the cost of 128 tasks under `vmap`; gradients of tasks are not told apart.

    Reference:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.1.
    """

    dimension: int = 10
    functions: int | None = None

    def __post_init__(self) -> None:
        check_count(self, "dimension", self.dimension)
        if self.functions is not None:
            check_count(self, "functions", self.functions, or_none=True)

    def loss(self, params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the squared residual, or the sum of those of all functions."""
        matrix, target = batch
        return ((matrix @ params[..., None])[..., 0] - target).square().sum()

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw W and y, the same at every step."""
        size = (self.dimension,) if self.functions is None else (self.functions, self.dimension)
        matrix = torch.randn(*size, self.dimension, generator=generator)
        target = torch.randn(size, generator=generator)
        same = matrix.expand(steps, *matrix.shape), target.expand(steps, *size)
        return Task(torch.zeros(size), same)
