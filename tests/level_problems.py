"""Small levels with known answers: every parameter is a vector, every loss nonlinear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD

CG = mo.Implicit(mo.ConjugateGradient(max_steps=20, rtol=1e-14))


class Value(nn.Module):
    """A tensor that is a model."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = nn.Parameter(torch.as_tensor(value).clone())

    def forward(self) -> Tensor:
        return self.value


def level(
    name: str, value: Any, loss: Callable[..., Any], lr: float = 0.1, **options: Any
) -> mo.Level:
    optimizer = options.pop("optimizer", None) or SGD(lr, momentum=options.pop("momentum", 0.0))
    return mo.Level(name, Value(value), loss, optimizer, **options)


def batches(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, generator=generator, dtype=torch.float64) for _ in range(count)]


def coupled(own: Tensor, above: Sequence[Tensor], below: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return a loss with curvature in everything, and mixed derivatives between all of it."""
    total = (own - torch.tanh(x)).square().sum() + 0.3 * (own * own * x.cos()).sum()
    for i, other in enumerate(above):
        total = (
            total
            + (
                (i + 1) * torch.sin(own + 0.5 * i) * torch.tanh(other)
                + 0.2 * (own - other).square()
            ).sum()
        )
    for i, other in enumerate(below):
        total = (
            total
            + (torch.exp(0.3 * other * own.cos()) * (1 + i) + 0.5 * (other - own).square()).sum()
        )
    return total


def tower_losses(
    depth: int, top_reads: Sequence[int]
) -> list[Callable[[list[Tensor], Tensor], Tensor]]:
    """Return the losses of levels 0 (top) to depth - 1.

    Each reads the one above and the one below, the top one `top_reads`.
    """

    def loss(i: int) -> Callable[[list[Tensor], Tensor], Tensor]:
        def of(values: list[Tensor], x: Tensor) -> Tensor:
            below = [values[j] for j in top_reads] if i == 0 else values[i + 1 : i + 2]
            return coupled(values[i], values[max(i - 1, 0) : i], below, x)

        return of

    return [loss(i) for i in range(depth)]


def tower(
    depth: int,
    steps: Sequence[int],
    rules: Sequence[Any],
    data: Sequence[list[Tensor]],
    top_reads: Sequence[int],
    **options: Any,
) -> mo.LevelGraph:
    """Return a graph of levels "v0" (top), "v1", ... below one another."""
    losses, start = tower_losses(depth, top_reads), batches(depth, 99)

    def loss(i: int) -> Callable[[Any, Tensor], Tensor]:
        names = {0, *top_reads} if i == 0 else {i - 1, i, min(i + 1, depth - 1)}

        def of(levels: Any, x: Tensor) -> Tensor:
            values = [
                getattr(levels, f"v{j}")() if j in names else torch.full_like(x, torch.nan)
                for j in range(depth)
            ]
            return losses[i](values, x)

        return of

    made = [level(f"v{i}", start[i], loss(i), 0.05, data=data[i]) for i in range(depth)]
    edges = [
        mo.Edge(made[i], made[i + 1], steps=steps[i], differentiate=rules[i], **options)
        for i in range(depth - 1)
    ]
    return mo.LevelGraph(edges)
