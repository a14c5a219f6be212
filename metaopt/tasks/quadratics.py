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

    Reference:
        Andrychowicz et al. 2016, arXiv:1606.04474, section 3.1.
    """

    dimension: int = 10

    def __post_init__(self) -> None:
        check_count(self, "dimension", self.dimension)

    def loss(self, params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return the squared residual."""
        matrix, target = batch
        return (matrix @ params - target).square().sum()

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw W and y, the same at every step."""
        matrix = torch.randn(self.dimension, self.dimension, generator=generator)
        target = torch.randn(self.dimension, generator=generator)
        same = matrix.expand(steps, -1, -1), target.expand(steps, -1)
        return Task(torch.zeros(self.dimension), same)
