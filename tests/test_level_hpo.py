"""Weight decay of each parameter of a logistic regression, learned through the level graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD
from optimizers.transforms import Transform


class Row(nn.Module):
    def __init__(self, value: float):
        super().__init__()
        self.w = nn.Parameter(torch.full((20,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class AtLeast(Transform):
    """Keeps parameters above a limit."""

    hyperparameters = ("limit",)

    def __init__(self, limit: float, optimizer: mo.Optimizer):
        super().__init__(optimizer, limit=limit)

    def after(self, updates: Any, params: Any, hyper: Any) -> Any:
        return [(p + u).clamp(min=hyper["limit"]) - p for u, p in zip(updates, params, strict=True)]


def train_loss(levels: Any, batch: Any) -> Tensor:
    x, y = batch
    decay, w = levels.decay.params["w"], levels.model.params["w"]
    return F.binary_cross_entropy_with_logits(levels.model(x), y) + 0.5 * (decay * w**2).sum()


def validation_loss(levels: Any, batch: Any) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(levels.model(x), y)


@pytest.mark.parametrize(
    ("rule", "seed", "expected"),
    [(mo.Backprop(), 0, 0.3657), (mo.Implicit(mo.ConjugateGradient(max_steps=3)), 0, 0.3664)],
    ids=str,
)
def test_the_loss_after_twenty_outer_steps(rule: Any, seed: int, expected: float) -> None:
    """Figures to four digits, of 100 inner steps from 0 for each of 20 outer ones.

    float32 moves the sixth.

    Two more data sets are in the test of `examples/weight_decay.py`.
    """
    r = np.random.RandomState(seed)
    true, x = r.randn(20), r.randn(1000, 20)
    y = x @ true + 0.1 * r.randn(1000) > 0
    x, y = torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)
    model = mo.Level("model", Row(0.0), train_loss, SGD(0.1), data=[(x[:500], y[:500])])
    outer = AtLeast(1e-8, SGD(1.0, momentum=0.9))
    decay = mo.Level("decay", Row(1.0), validation_loss, outer, data=[(x[500:], y[500:])])
    graph = mo.LevelGraph([mo.Edge(decay, model, steps=100, start="restart", differentiate=rule)])
    losses = [graph.step()["decay/loss"] for _ in range(20)]
    assert round(float(losses[-1]), 4) == expected
