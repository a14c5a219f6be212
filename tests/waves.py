"""Tasks of a meta-training that are cheap, and of which now and then one diverges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam


class Waves:
    """Fits of a line to waves; now and then one that diverges."""

    def loss(self, params: Any, batch: Any) -> Tensor:
        x, y, scale = batch
        return scale.mean() * (params["w"] * x + params["b"] - y).square().mean()

    def sample(self, generator: torch.Generator, steps: int) -> mo.Task:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        params = {"w": normal(), "b": normal()}
        wild = torch.where(torch.rand((), generator=generator) < 0.2, torch.inf, 1.0)
        x = normal(steps, 6)
        return mo.Task(
            params, (x, (2 * x).sin(), wild.double().expand(steps, 6)), (x[0], x[0], x[0])
        )


def make_training(tasks: Any) -> mo.MetaTraining:
    """Return the training of a learning rate by PES."""
    optimizer = SGD(lr=nn.Parameter(torch.tensor(0.05, dtype=torch.float64)))
    estimator = mo.PES(0.01, 4, window=3)
    return mo.MetaTraining(optimizer, tasks, estimator=estimator, outer=Adam(lr=1e-2), horizon=7)
