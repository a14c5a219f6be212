"""Implicit MAML on few-shot digits: the meta-gradient without remembering how a task was learned.

    python examples/implicit_maml.py   # 100 meta-steps, as in the results
    python examples/implicit_maml.py --steps 20 --tasks 8 --test-tasks 50   # a look

Each task is to tell 5 digits apart, in a random order, from one image of each. A network adapts to
a task by descending, from the meta-parameters m,

    L_task(w) = cross-entropy on the 5 images + lam / 2 |w - m|^2,

and m is to make the loss on other images small after that. MAML differentiates the steps. Implicit
MAML (Rajeswaran, Finn, Kakade, Levine 2019, arXiv:1909.04630) needs only where they ended: the
derivative of the minimiser is lam (H + lam)^-1, which 5 steps of conjugate gradients apply. The
memory then does not grow with the steps, and any optimizer may make them.

Both are compared, on images that were not trained on, with the same adaptation from random weights:
no meta-learning.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.digits import digits
from optimizers import SGD, Adam

WAYS, QUERIES = 5, 10


def episodes(
    split: slice, seed: int, tasks: int, part: int, repeat: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images [tasks, n, 64], labels) of fresh tasks, each `repeat` times.

    Part 0 of a task is to adapt on, part 1 to be judged on.
    """
    images, labels = (values[split] for values in digits())
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.empty(tasks, WAYS, 1 + QUERIES, dtype=torch.int64)
        for task in rows:
            for way, digit in enumerate(torch.randperm(10, generator=generator)[:WAYS]):
                found = (labels == digit).nonzero()[:, 0]
                task[way] = found[torch.randperm(len(found), generator=generator)[: 1 + QUERIES]]
        chosen = rows[:, :, :1] if part == 0 else rows[:, :, 1:]
        x = images[chosen].flatten(1, 2)
        y = torch.arange(WAYS)[:, None].expand(chosen.shape).flatten(1)
        for _ in range(repeat):
            yield x, y


def level_graph(
    model: nn.Module,
    rule: Any,
    lam: float,
    optimizer: mo.Optimizer,
    *,
    split: slice,
    tasks: int,
    adapt: int,
) -> mo.LevelGraph:
    """Return the graph in which `model` is the start of `tasks` tasks, new ones at every step."""

    def task_loss(levels: Any, batch: Any) -> Tensor:
        x, y = batch
        error = F.cross_entropy(levels.task(x), y)
        if lam == 0:
            return error
        pairs = zip(levels.task.params.values(), levels.meta.params.values(), strict=True)
        return error + lam / 2 * sum((w - m).square().sum() for w, m in pairs)

    def meta_loss(levels: Any, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        logits = levels.task(x)
        return {
            "loss": F.cross_entropy(logits, y),
            "accuracy": (logits.argmax(-1) == y).float().mean(),
        }

    support, query = (
        episodes(split, 0, tasks, part, repeat) for part, repeat in enumerate((adapt, 1))
    )
    task = mo.Level(
        "task", copy.deepcopy(model), task_loss, SGD(0.1, momentum=0.9), support, copies=tasks
    )
    meta = mo.Level("meta", model, meta_loss, optimizer, query)
    return mo.LevelGraph([mo.Edge(meta, task, steps=adapt, start="upper", differentiate=rule)])


def main(
    steps: int = 100, tasks: int = 16, adapt: int = 16, lam: float = 0.2, test_tasks: int = 500
) -> None:
    """Meta-learn the start of a network on few-shot tasks.

    Args:
        steps: meta-steps.
        tasks: per meta-step.
        adapt: steps of adaptation.
        lam: strength of the proximal term.
        test_tasks: tasks with held-out images to compare on.
    """
    # the network's Hessian has negative eigenvalues too
    implicit = mo.Implicit(mo.ConjugateGradient(max_steps=5, damping=0.1))
    methods = {
        "no meta-learning": (None, 0.0),
        "MAML": (mo.Backprop(), 0.0),
        "implicit MAML": (implicit, lam),
    }
    accuracies = {}
    for name, (rule, strength) in methods.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, WAYS))
        if rule:
            graph = level_graph(
                model, rule, strength, Adam(0.003), split=slice(1200), tasks=tasks, adapt=adapt
            )
            print(graph)
            mo.Trainer(graph, max_steps=steps, label=name).fit()
        test = level_graph(
            model,
            mo.FirstOrder(),
            strength,
            SGD(0.0),
            split=slice(1200, None),
            tasks=test_tasks,
            adapt=adapt,
        )
        accuracies[name] = float(test.step()["meta/accuracy"])
    print(
        f"Accuracy on {test_tasks} tasks with held-out images, {WAYS} digits to tell apart from "
        "one image of each:"
    )
    for name, accuracy in accuracies.items():
        print(f"{name:>17}: {accuracy:.3f}")
    none, maml, imaml = accuracies.values()
    assert imaml > none + (0.05 if steps >= 100 else 0), "meta-learning must help"
    assert steps < 100 or imaml > maml - 0.05, "without the steps, nearly as good as with them"


if __name__ == "__main__":
    tyro.cli(main)
