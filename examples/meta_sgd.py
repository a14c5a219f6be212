"""Meta-SGD: an initialisation, and a step size for each entry of each parameter, learned together.

    python examples/meta_sgd.py                                # 2000 meta-steps, as in the results
    python examples/meta_sgd.py --steps 100 --test-tasks 100   # a look

A task is a sine wave, seen at 10 points; the network adapts by one step w - a * grad L(w). MAML
learns w alone, and its rate a is one number, the best of a few. Meta-SGD (Li, Zhou, Chen, Li 2017,
arXiv:1707.09835) learns a vector a as well, of the size of w, whose entries may become negative: it
is direction and rate at once. Both are tested on waves that were not trained on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import tyro
from tabulate import tabulate
from torch import Tensor

import metaopt as mo
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp
from optimizers import SGD, PerParameter

# of MAML; waves in a meta-gradient; points of a wave
RATES, TASKS, COUNT = (0.003, 0.01, 0.03), 25, {"shots": 10, "queries": 10}


def train(lr: float, learned: bool, steps: int, tests: Any) -> tuple[Tensor, Any]:
    """Return (the squared error on each test task after one step, the inner SGD).

    This is MAML, or Meta-SGD if the rates are learned.
    """
    torch.manual_seed(0)
    model, waves, generator = sinusoid_mlp(), Sinusoids(), torch.Generator().manual_seed(0)
    net = mo.functional(model)
    inner = SGD(lr=PerParameter(net.params, lr) if learned else lr)

    def loss(params: Any, batch: Any) -> Tensor:
        return F.mse_loss(net(params, batch[0]), batch[1])

    def task_loss(params: Any, task: Any) -> Tensor:
        return loss(mo.minimize(loss, inner, params, task.support, steps=1).params, task.query)

    meta_gradient = mo.meta_grad(task_loss, learn=inner if learned else None)
    outer = torch.optim.Adam([*model.parameters(), *inner.parameters()], lr=2e-3)
    for _ in range(steps):
        grads, _ = meta_gradient(net.params, waves.sample(generator, TASKS, **COUNT))
        if learned:
            grads, of_rates = grads
            mo.assign_grads(inner, of_rates)
        mo.assign_grads(model, grads)
        outer.step()
    with torch.no_grad():
        return torch.func.vmap(task_loss, (None, 0))(net.params, tests), inner


def main(steps: int = 2000, test_tasks: int = 1000) -> dict[str, Tensor]:
    """Train MAML with some rates, and Meta-SGD, and return the squared errors on the test tasks."""
    tests = Sinusoids().sample(torch.Generator().manual_seed(1), test_tasks, shots=10, queries=100)
    found = {f"MAML, rate {lr:g}": train(lr, False, steps, tests)[0] for lr in RATES}
    ours, inner = train(0.01, True, steps, tests)
    best = min(found, key=lambda name: found[name].mean().item())
    rows = [
        (name, e.mean(), e.std() / test_tasks**0.5)
        for name, e in {**found, "Meta-SGD": ours}.items()
    ]
    print(
        tabulate(rows, [f"after {steps} meta-steps", "squared error", "std. error"], floatfmt=".3f")
    )
    rates = torch.cat([value.detach().flatten() for value in inner.lr.params.values()])
    print(
        f"Meta-SGD's rates: from {rates.min():.3f} to {rates.max():.3f}, "
        f"{(rates < 0).float().mean():.0%} below 0."
    )
    gain = found[best] - ours
    print(f"{best} - Meta-SGD: {gain.mean():.3f} +- {gain.std() / test_tasks**0.5:.3f}")
    assert steps < 2000 or gain.mean() > 2 * gain.std() / test_tasks**0.5, (
        "it is better than MAML with any of the rates"
    )
    return {**found, "Meta-SGD": ours}


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
