"""Regularisation that is learned to be learned.

    python examples/implicit_middle.py   # 30 meta-steps, as in the results
    python examples/implicit_middle.py --steps 1 --copies 4 --test-tasks 10     # a look

An implicit middle level stands under a top level that unrolls it. Each task is to tell two
handwritten digits apart from 8 noisy images of each, 8 x 8 pixels.

- "classifier", a logistic regression with weights w, minimises
  cross-entropy + 1/2 sum_i exp(s_i) w_i^2;
- "strength" makes 3 steps on s, one number for each pixel, to lower the loss on 8 further images of
  each digit. Its gradient is implicit, -[d grad_w L / ds]' H^-1 v: it does not depend on the steps
  that led to w (Lorraine, Vicol, Duvenaud 2020, arXiv:1911.02590);
- "initial_strength" is where s starts in every task. It is learned so that those 3 steps lower the
  loss on yet other images: by `Backprop` through the steps of "strength", so the implicit gradients
  are themselves differentiated.

The top hypergradient is checked by finite differences. The learned start is compared, on unseen
pairs of digits, with the best single one.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.digits import digits
from optimizers import SGD, Adam, ClipNorm

PIXELS, SHOTS, MIDDLE, NOISE = 64, 8, 3, 0.5
Pairs = list[tuple[int, int]]
PAIRS: Pairs = list(itertools.combinations(range(10), 2))
TRAIN_PAIRS, TEST_PAIRS = [p for p in PAIRS if sum(p) % 3], [p for p in PAIRS if sum(p) % 3 == 0]


def vector(value: float) -> nn.Module:
    """Return one number for each pixel, and as a model their weighted sum."""
    model = nn.Linear(PIXELS, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def tasks(
    pairs: Pairs, seed: int, copies: int, part: int, repeat: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images [copies, 16, 64] and labels [copies, 16] of one part of a task, `repeat` times.

    A task has three disjoint parts.
    """
    images, labels = digits()
    images = (images - images.mean(0)).to(torch.get_default_dtype())
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(2).repeat_interleave(SHOTS).to(images)
    while True:
        rows = []
        for pair in torch.randint(len(pairs), (copies,), generator=generator).tolist():
            for digit in pairs[pair]:
                of_digit = (labels == digit).nonzero()[:, 0]
                rows.append(
                    of_digit[torch.randperm(len(of_digit), generator=generator)[: 3 * SHOTS]]
                )
        x = images[torch.stack(rows)].unflatten(0, (copies, 2)).unflatten(2, (3, SHOTS))
        noisy = x + NOISE * torch.randn(x.shape, generator=generator).to(x)
        yield from [(noisy[:, :, part].flatten(1, 2), y.expand(copies, -1))] * repeat


def fit_loss(levels: Any, batch: Any) -> Tensor:
    """Return the regularised loss of the classifier."""
    strength = levels.strength.params["weight"].exp()
    return (
        held_out_loss(levels, batch)
        + 0.5 * (strength * levels.classifier.params["weight"].square()).sum()
    )


def held_out_loss(levels: Any, batch: Any) -> Tensor:
    """Return the loss of the classifier, of both levels above on images of their own."""
    x, y = batch
    return F.binary_cross_entropy_with_logits(levels.classifier(x)[..., 0], y)


def level_graph(
    start: nn.Module, optimizer: mo.Optimizer, pairs: Pairs, seed: int, copies: int, solve: int
) -> mo.LevelGraph:
    """Return the graph in which `start` holds the initial strengths of `copies` tasks.

    There are new tasks at every step.
    """
    data = [
        tasks(pairs, seed, copies, part, repeat)
        for part, repeat in enumerate((MIDDLE * solve, MIDDLE, 1))
    ]
    classifier = mo.Level(
        "classifier",
        vector(0.0),
        fit_loss,
        SGD(0.3, momentum=0.9, nesterov=True),
        data[0],
        copies=copies,
    )
    strength = mo.Level(
        "strength", vector(0.0), held_out_loss, ClipNorm(0.1, SGD(20.0)), data[1], copies=copies
    )
    initial = mo.Level("initial_strength", start, held_out_loss, optimizer, data[2])
    implicit = mo.Implicit(mo.ConjugateGradient(max_steps=30, rtol=1e-4 if copies > 2 else 1e-12))
    top = mo.Edge(initial, strength, steps=MIDDLE, start="upper", differentiate=mo.Backprop())
    return mo.LevelGraph(
        [top, mo.Edge(strength, classifier, steps=solve, start="restart", differentiate=implicit)]
    )


def check_hypergradient() -> None:
    """Compare a directional derivative of the top loss with central differences.

    This is in float64, with w solved to rounding.
    """
    torch.set_default_dtype(torch.float64)

    start = vector(-2.0)
    direction = torch.randn(1, PIXELS, generator=torch.Generator().manual_seed(0))
    h = 1e-4
    graph = level_graph(start, SGD(0.0), TRAIN_PAIRS, seed=5, copies=2, solve=250)
    exact = (graph.hypergradient("initial_strength")["weight"] * direction).sum()
    high, low = (
        graph.objective("initial_strength", {"weight": -2.0 + sign * h * direction})
        for sign in (1, -1)
    )
    differences = (high - low) / (2 * h)
    torch.set_default_dtype(torch.float32)
    print(
        f"Hypergradient of the initial strengths, along a direction: {exact:.8g}; finite "
        f"differences {differences:.8g}"
    )
    assert abs(exact / differences - 1) < 1e-5


def main(steps: int = 30, copies: int = 16, solve: int = 40, test_tasks: int = 200) -> None:
    """Learn where strengths start, from `copies` tasks a step.

    For each step of the strengths, `solve` steps fit a classifier.
    """
    check_hypergradient()
    learned = vector(-3.0)
    graph = level_graph(learned, Adam(0.2), TRAIN_PAIRS, seed=0, copies=copies, solve=solve)
    print(graph)
    mo.Trainer(graph, max_steps=steps, label="initial strengths").fit()

    def test_loss(start: nn.Module) -> float:
        test = level_graph(start, SGD(0.0), TEST_PAIRS, seed=1, copies=test_tasks, solve=solve)
        return float(test.step()["initial_strength/loss"])

    grid = {s: test_loss(vector(s)) for s in (-5.0, -4.0, -3.0, -2.0)}
    for s, loss in grid.items():
        print(f"start at strength exp({s:g}) for every pixel: test loss {loss:.4f}")
    found = test_loss(learned)
    print(f"learned start: test loss {found:.4f}")
    print(
        "log strengths learned, by pixel:\n", learned.weight.detach().reshape(8, 8).numpy().round(1)
    )
    assert steps < 30 or found < min(grid.values()), (
        "a learned start is better than the best single strength"
    )


if __name__ == "__main__":
    tyro.cli(main)
