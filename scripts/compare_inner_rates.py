"""Learned schedules of the inner rate against the tuned constant one, in MAML and in Reptile.

python scripts/compare_inner_rates.py maml --json benchmarks/schedules.json
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from inner_schedule import Kind, make_inner
from maml import TEST_SEED, VALIDATION_SEED, Batch, MetaLearning, SinusoidConfig, adapt, maml_loss
from reptile import reptile_loss
from schedule_report import write_json
from torch import Tensor

import metaopt as mo
from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.tasks.episode import Episode
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp

with extra("scripts/compare_inner_rates.py"):
    import tyro
    from tabulate import tabulate


@dataclass(frozen=True)
class Config:
    """Sine waves; the constant rate is tuned on validation tasks, and all is tested on others."""

    algorithm: tyro.conf.Positional[Literal["maml", "reptile"]]
    """What trains the initialisation."""
    kinds: tuple[Kind, ...] = ("lstm",)
    """Schedules that all tensors share."""
    per_tensor: tuple[Kind, ...] = ("gp",)
    """Schedules of which each tensor has its own."""
    shots: int = 10
    """Points to adapt on."""
    inner_steps: int = 5
    """Gradient steps of the adaptation, in training and in the test."""
    rates: tuple[float, ...] = (0.01, 0.02, 0.04)
    """Constant rates; the best is also where the schedules start."""
    max_steps: int = 8000
    """Meta-gradients."""
    schedule_lr: float = 0.01
    """Step size of the outer Adam for the schedule."""
    seeds: int = 3
    """Trainings of each."""
    test_tasks: int = 1000
    """Tasks in the test."""
    compile: bool = True
    """Compile the meta-gradient."""
    out: Path = Path("runs/inner-rates")
    """Folder for the weights and events."""
    json: Path | None = None
    """A file that the figures are written to."""


def train_and_test(
    config: Config, kind: Kind, per_tensor: bool, rate: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Return squared errors after the adaptation, of validation and of test tasks: [tasks] each."""
    torch.manual_seed(seed)
    model, waves = sinusoid_mlp(), Sinusoids()
    net = mo.functional(model)

    def loss(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(net(params, x), y)

    options = SinusoidConfig(
        shots=config.shots,
        inner_steps=config.inner_steps,
        inner_lr=rate,
        schedule_lr=config.schedule_lr,
        seed=seed,
        out=config.out,
    )
    names = net.params if per_tensor else ()
    inner = make_inner(kind, rate, config.inner_steps, names, seed)
    make_loss = maml_loss if config.algorithm == "maml" else reptile_loss
    sample = partial(
        waves.sample, tasks=options.meta_batch, shots=config.shots, queries=options.queries
    )
    training = MetaLearning(
        model, make_loss(loss, options, inner), sample, options, inner, compile=config.compile
    )
    for step in range(config.max_steps):
        if step == config.max_steps * 3 // 4:  # the last quarter with a tenth of the rates
            for group in training.outer.param_groups:
                group["lr"] /= 10
        training.step()

    def one(task: Episode) -> Tensor:
        (adapted,) = adapt(loss, inner, (config.inner_steps,), net.params, task)
        return loss(adapted, task.query)

    draw = partial(
        waves.sample, tasks=config.test_tasks, shots=config.shots, queries=options.test_queries
    )
    with torch.no_grad():
        validation, test = (
            torch.func.vmap(one)(draw(torch.Generator().manual_seed(number)))
            for number in (VALIDATION_SEED, TEST_SEED)
        )
    return validation, test


def describe(scores: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return means and 95 % intervals of scores [seeds, tasks], and of paired differences.

    The intervals are over tasks, of the mean over seeds; the seeds stand beside.
    """

    def interval(rows: Tensor) -> tuple[float, float]:
        each = rows.mean(0)
        return float(each.mean()), float(1.96 * each.std() / math.sqrt(len(each)))

    (error, margin), (difference, paired) = interval(scores), interval(scores - reference)
    return {
        "error": error,
        "±": margin,
        "seeds": [round(float(one), 4) for one in scores.mean(1)],
        "difference": difference,
        "± difference": paired,
    }


def main(config: Config) -> None:
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    first = {rate: train_and_test(config, "none", False, rate, 0) for rate in config.rates}
    tuned = {rate: float(validation.mean()) for rate, (validation, _) in first.items()}
    best = min(tuned, key=lambda rate: tuned[rate] if math.isfinite(tuned[rate]) else math.inf)
    print("validation error of the constant rates, seed 0:", tuned, flush=True)
    others = [train_and_test(config, "none", False, best, s)[1] for s in range(1, config.seeds)]
    reference = torch.stack([first[best][1], *others])
    rows = {f"constant, best of {len(config.rates)}: {best:g}": describe(reference, reference)}
    jobs = [(kind, False) for kind in config.kinds] + [(kind, True) for kind in config.per_tensor]
    for kind, per_tensor in jobs:
        started = time.process_time()
        runs = [train_and_test(config, kind, per_tensor, best, s) for s in range(config.seeds)]
        scores = torch.stack([test for _, test in runs])
        name = f"{kind}, {'one for each tensor' if per_tensor else 'one for all tensors'}"
        rows[name] = {
            **describe(scores, reference),
            "validation": float(torch.stack([seen for seen, _ in runs]).mean()),
            "CPU seconds a run": round((time.process_time() - started) / config.seeds, 1),
        }
        print(name, rows[name], flush=True)
    print(tabulate([[name, *row.values()] for name, row in rows.items()], floatfmt=".4f"))
    if config.json:
        key = f"{config.algorithm}, {config.shots} shots, {config.inner_steps} steps"
        write_json(config.json, key, asdict(config), {"tuning": tuned, "rows": rows})


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
