"""Learn one weight decay for every parameter of a logistic regression.

    python examples/weight_decay.py --seeds 3

The derivative is exact, or from the implicit function theorem. The lower level minimises BCE(w) +
1/2 sum_i lam_i w_i^2 on 500 examples, by 100 steps from 0; the upper level moves lam to lower the
loss on 500 others. Two rules differentiate the response of w: `Backprop` through all steps, which
is exact, and `Implicit(ConjugateGradient(max_steps=3))`, which looks only at where the steps ended.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate
from torch import Tensor, nn

import metaopt as mo
from optimizers import SGD, Transform

FEATURES, EXAMPLES = 20, 1000
RULES = {"exact": mo.Backprop(), "CG(3)": mo.Implicit(mo.ConjugateGradient(max_steps=3))}


class Linear(nn.Module):
    """x @ w."""

    def __init__(self, value: float):
        super().__init__()
        self.w = nn.Parameter(torch.full((FEATURES,), value))

    def forward(self, x: Tensor) -> Tensor:
        """Return a number for each row."""
        return x @ self.w


class AtLeast(Transform):
    """Keeps parameters above a limit."""

    hyperparameters = ("limit",)

    def __init__(self, limit: float, optimizer: mo.Optimizer):
        super().__init__(optimizer, limit=limit)

    def after(self, updates: Any, params: Any, hyper: Any) -> Any:
        """Return the updates, cut where they would lead below the limit."""
        return [(p + u).clamp(min=hyper["limit"]) - p for u, p in zip(updates, params, strict=True)]


class Losses(list[float]):
    """A logger that keeps the validation loss of each step."""

    def log(self, step: int, metrics: Any) -> None:
        """Keep it."""
        self.append(metrics["decay/loss"])

    def close(self) -> None:
        """Do nothing."""


def train_loss(levels: Any, batch: Any) -> Tensor:
    """Return BCE(w) + 1/2 sum_i lam_i w_i^2."""
    decay, w = levels.decay.params["w"], levels.model.params["w"]
    return validation_loss(levels, batch) + 0.5 * (decay * w**2).sum()


def validation_loss(levels: Any, batch: Any) -> Tensor:
    """Return BCE(w)."""
    x, y = batch
    return F.binary_cross_entropy_with_logits(levels.model(x), y)


def data(seed: int) -> tuple[Tensor, Tensor]:
    """Return (x [1000, 20], labels [1000]) of a random linear rule with a little noise."""
    r = np.random.RandomState(seed)
    w, x = r.randn(FEATURES), r.randn(EXAMPLES, FEATURES)
    y = x @ w + 0.1 * r.randn(EXAMPLES) > 0
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=torch.float32)


def validation_losses(rule: Any, seed: int, steps: int) -> list[float]:
    """Return the loss on the validation half in every outer step."""
    x, y = data(seed)
    half, losses = EXAMPLES // 2, Losses()
    model = mo.Level("model", Linear(0.0), train_loss, SGD(0.1), data=[(x[:half], y[:half])])
    outer = AtLeast(1e-8, SGD(1.0, momentum=0.9))
    decay = mo.Level("decay", Linear(1.0), validation_loss, outer, data=[(x[half:], y[half:])])
    graph = mo.LevelGraph([mo.Edge(decay, model, steps=100, start="restart", differentiate=rule)])
    mo.Trainer(
        graph, max_steps=steps, logger=losses, label=f"{type(rule).__name__}, seed {seed}"
    ).fit()
    return losses


def main(seeds: int = 3, steps: int = 20) -> dict[str, list[float]]:
    """Return the validation loss in the last outer step, for each rule and data set."""
    found: dict[str, list[float]] = {}
    for name, rule in RULES.items():
        runs = [validation_losses(rule, seed, steps) for seed in range(seeds)]
        assert all(run[-1] < run[0] for run in runs), (
            "learning the weight decay lowers the validation loss"
        )
        found[name] = [run[-1] for run in runs]
    headers = [f"loss in outer step {steps}", *(f"data {seed}" for seed in range(seeds))]
    print(
        tabulate(
            [[name, *losses] for name, losses in found.items()], headers=headers, floatfmt=".4f"
        )
    )
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
