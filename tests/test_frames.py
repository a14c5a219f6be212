"""How many calls of ours stand between a user's call and the user's loss, as in its traceback."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Adam

ROOT = Path(__file__).parents[1]
OURS = (str(ROOT / "metaopt"), str(ROOT / "optimizers"))


def frames() -> list[str]:
    """Return our functions on the stack, outermost first."""
    return [frame.name for frame in traceback.extract_stack() if frame.filename.startswith(OURS)]


def test_between_a_step_of_a_graph_and_a_loss() -> None:
    """Meta-weight-net: the loss of the lower level, in one of its steps."""
    seen: list[list[str]] = []
    classifier = nn.Linear(4, 3)
    weight_net = nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid())
    batch = (torch.randn(8, 4), torch.randint(3, (8,)))

    def learner_loss(levels: mo.Levels, batch: Any) -> Tensor:
        x, y = batch
        seen.append(frames())
        losses = F.cross_entropy(levels.learner(x), y, reduction="none")
        return (levels.weights(losses.detach()[:, None]).squeeze(-1) * losses).mean()

    def meta_loss(levels: mo.Levels, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(levels.learner(x), y)

    learner = mo.Level("learner", classifier, learner_loss, SGD(0.1), data=[batch])
    weights = mo.Level("weights", weight_net, meta_loss, Adam(1e-3), data=[batch])
    rule = mo.FiniteDifference()
    graph = mo.LevelGraph([mo.Edge(upper=weights, lower=learner, differentiate=rule)])
    seen.clear()
    graph.step()
    assert seen[0][0] == "step"
    assert len(seen[0]) <= 12, seen[0]


def test_between_minimize_and_a_loss() -> None:
    seen: list[list[str]] = []

    def loss(w: Tensor, x: Tensor) -> Tensor:
        seen.append(frames())
        return (w - x).square().sum()

    w = torch.zeros(2, requires_grad=True)
    mo.minimize(loss, SGD(0.1), w, torch.ones(2), steps=2)
    assert seen[-1][0] == "minimize"
    assert len(seen[-1]) <= 9, seen[-1]  # minimize itself among them
