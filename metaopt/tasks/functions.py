"""Functions that are hard to minimise: ill-conditioned and noisy ones, and Rosenbrock's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.checks import check_count
from metaopt.meta_training.task import Task


@dataclass(frozen=True)
class NoisyQuadratics:
    """L(w) = 1/2 (w - b_t)^T Q diag(h) Q^T (w - b_t), from a start N(0, I).

    Q is a random rotation, and the curvatures h are 1 to 1 / condition in equal ratios. The minimum
    b_t = b + noise z_t is that of a batch: b ~ N(0, I), z_t ~ N(0, I) drawn anew at every step.

    Args:
        dimension: of w.
        condition: the largest curvature over the smallest.
        noise: standard deviation of the minimum from step to step.

    Raises:
        ValueError: a number that is out of range.
    """

    dimension: int = 10
    condition: float = 100.0
    noise: float = 0.1

    def __post_init__(self) -> None:
        check_count(self, "dimension", self.dimension)
        if not (self.condition >= 1 and self.noise >= 0):
            raise ValueError(
                "NoisyQuadratics: `condition` must be at least 1 and `noise` at least 0, got "
                f"{self.condition} and {self.noise}."
            )

    def loss(self, params: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return L for (a root of the matrix, b_t)."""
        root, center = batch
        return 0.5 * (root @ (params - center)).square().sum()

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw a function, the same at every step, and noise."""
        n = self.dimension
        rotation, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
        curvatures = self.condition ** -torch.linspace(0, 1, n)
        root = curvatures.sqrt()[:, None] * rotation
        center, start = torch.randn(2, n, generator=generator)
        centers = center + self.noise * torch.randn(steps, n, generator=generator)
        return Task(start, (root.expand(steps, -1, -1), centers))


@dataclass(frozen=True)
class Rosenbrock:
    """L(w) = sum_i 100 (w_{i+1} - w_i^2)^2 + (1 - w_i)^2, from starts U(-2, 2).

    Args:
        dimension: of w, at least 2.

    Raises:
        ValueError: another dimension.

    Reference:
        Rosenbrock, The Computer Journal 3(3), 1960.
    """

    dimension: int = 2

    def __post_init__(self) -> None:
        check_count(self, "dimension", self.dimension, least=2)

    def loss(self, params: Tensor, batch: Tensor) -> Tensor:
        """Return the function; it has no data."""
        first, second = params[:-1], params[1:]
        return (100 * (second - first.square()).square() + (1 - first).square()).sum()

    def sample(self, generator: torch.Generator, steps: int) -> Task:
        """Draw a start."""
        start = 4 * torch.rand(self.dimension, generator=generator) - 2
        return Task(start, torch.zeros(steps))
