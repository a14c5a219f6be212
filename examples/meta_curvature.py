"""Meta-Curvature: an initialisation and a transformation of each layer's gradient.

    python examples/meta_curvature.py   # 1200 meta-steps, as in the results
    python examples/meta_curvature.py --steps 100 --test-tasks 50   # a look

They are learned together. A task is to tell five turned digits apart, from one image of each, by 3
gradient steps. Park and Oliva (2019, arXiv:1902.03356) transform the gradient G of a matrix to M_o
G M_i before the step; both matrices are the identity at first and are learned by the outer loop, as
the initial weights are. Here `MetaCurvature` does so in front of `SGD`. It is compared with MAML,
whose only difference is that the matrices stay as they are, on digits that were not trained on.
(Its rate, 0.1 for both, was not tuned.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

import metaopt as mo
from metaopt.tasks.digits import digits
from metaopt.tasks.omniglot import CharacterTasks
from optimizers import SGD, MetaCurvature

COUNT = {"ways": 5, "shots": 1, "queries": 5}


def train(learned: bool, steps: int, tasks: int, sides: Any, test_tasks: int) -> Tensor:
    """Train with or without learning the matrices, and return the accuracy on each test task."""
    generator = torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 5)
    )
    net = mo.functional(model)
    inner = MetaCurvature(net.params, SGD(0.1))

    def loss(params: Any, batch: Any) -> Tensor:
        return F.cross_entropy(net(params, batch[0].flatten(1)), batch[1])

    def task_loss(params: Any, task: Any) -> Any:
        after = mo.minimize(loss, inner, params, task.support, steps=3).params
        right = net(after, task.query[0].flatten(1)).argmax(-1) == task.query[1]
        return loss(after, task.query), right.float().mean()

    meta_gradient = mo.meta_grad(task_loss, learn=inner, has_aux=True)
    outer = torch.optim.Adam(
        [*model.parameters(), *(inner.parameters() if learned else [])], lr=1e-3
    )
    for _ in range(steps):
        (grads, of_inner), *_ = meta_gradient(
            net.params, sides[0].sample(generator, tasks, **COUNT)
        )
        mo.assign_grads(model, grads)
        mo.assign_grads(inner, of_inner)
        outer.step()
    tests = sides[1].sample(torch.Generator().manual_seed(1), test_tasks, **COUNT)
    with torch.no_grad():
        return torch.func.vmap(task_loss, (None, 0))(net.params, tests)[1]


def main(steps: int = 1200, tasks: int = 16, test_tasks: int = 1000) -> dict[str, Tensor]:
    """Train MAML and Meta-Curvature, and return the accuracy on each test task."""
    images, labels = digits()
    drawn = [
        (255 * images[labels == digit][:170]).to(torch.uint8).view(-1, 1, 8, 8)
        for digit in range(10)
    ]
    sides = [
        CharacterTasks({"digits": torch.stack(drawn[half::2])}, rotations=True) for half in (0, 1)
    ]
    found = {
        name: train(learned, steps, tasks, sides, test_tasks)
        for name, learned in (("MAML", False), ("Meta-Curvature", True))
    }
    for name, accuracies in found.items():
        print(
            f"{name:>14}: test accuracy {accuracies.mean():.3f} +- "
            f"{accuracies.std() / test_tasks**0.5:.3f}"
        )
    gain = found["Meta-Curvature"] - found["MAML"]
    print(f"    difference: {gain.mean():.3f} +- {gain.std() / test_tasks**0.5:.3f}")
    assert steps < 1200 or gain.mean() > 2 * gain.std() / test_tasks**0.5, (
        "learning the matrices helps"
    )
    return found


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
