"""Reptile: an initialisation moves towards where a few gradient steps on each task lead it.

    python scripts/reptile.py
    python scripts/reptile.py --schedule gp --per-tensor

The rate of these steps may be a learned schedule, as in the second command.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import metaopt as mo
from metaopt import tree
from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.tasks.episode import Episode
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp
from optimizers import SGD

with extra("scripts/reptile.py"):
    import command_line
    import tyro
    from maml import (
        TEST_SEED,
        Batch,
        Loss,
        MetaLearning,
        SinusoidConfig,
        adapt,
        inner_of,
        report,
    )


@dataclass(kw_only=True)
class ReptileConfig(SinusoidConfig):
    """Regression of sine waves from a few points, by Reptile."""

    inner_lr: float = 0.02
    schedule_lr: float = 3e-3
    """step size of the outer Adam for the schedule; at .01 some trainings diverged"""
    # MAML's alone
    first_order: tyro.conf.Suppress[tyro.conf.Fixed[bool]] = False
    pretrain_steps: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0
    out: Path = Path("runs/reptile")


def reptile_loss(loss: Loss, config: SinusoidConfig, inner: SGD) -> Callable[..., Tensor]:
    """Return a loss whose derivative in w is w - w', where w' is w after steps of `inner`.

    Its value, and its derivative in what `inner` learns, are those of the query loss at w', with w
    held constant: exact through the steps. So the initialisation takes Reptile's steps, and the
    schedule those that adapt best.

    Reference:
        Nichol, Achiam, Schulman 2018, arXiv:1803.02999, algorithm 2, w - w' taken for a gradient by
        Adam.
    """

    def task_loss(params: Params, task: Episode) -> Tensor:
        start = tree.map(torch.Tensor.detach, params)
        after = mo.minimize(loss, inner, start, task.support, steps=config.inner_steps).params
        distance = tree.sum_leaves(
            lambda leaf: leaf.square().sum() / 2,
            {name: params[name] - after[name].detach() for name in params},
        )
        return loss(after, task.query) + distance - distance.detach()

    return task_loss


def run(config: SinusoidConfig) -> dict[str, Tensor]:
    """Train, test, and write everything into `config.out`.

    The result is squared errors [test tasks, steps] by method.
    """
    torch.manual_seed(config.seed)
    model, waves = sinusoid_mlp(), Sinusoids()
    net = mo.functional(model)

    def loss(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(net(params, x), y)

    inner = inner_of(config, net.params)
    sample = partial(
        waves.sample, tasks=config.meta_batch, shots=config.shots, queries=config.queries
    )
    MetaLearning(
        model, reptile_loss(loss, config, inner), sample, config, inner, compile=config.compile
    ).fit("reptile", config.max_steps, config)
    inner.save(config.out / "inner.safetensors")
    test = waves.sample(
        torch.Generator().manual_seed(TEST_SEED),
        config.test_tasks,
        shots=config.shots,
        queries=config.test_queries,
    )

    def one(task: Episode) -> Tensor:
        path = adapt(loss, inner, config.test_steps, net.params, task)
        return torch.stack([loss(adapted, task.query) for adapted in path])

    with torch.no_grad():
        scores = {"Reptile": torch.func.vmap(one)(test)}
    report("mean squared error", scores, config, {})
    return scores


def main(config: ReptileConfig) -> None:
    torch.set_num_threads(1)  # tensors this small only make threads wait for each other
    run(config)
    print(f"Weights and TensorBoard events: {config.out}")


if __name__ == "__main__":
    command_line.run(main, ReptileConfig, __doc__)
