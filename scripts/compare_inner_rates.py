"""Learned schedules of the inner rate against the tuned constant one, in MAML and in Reptile.

Rates are chosen by trainings with other seeds. The trainings that are reported come in pairs, with
the same initial weights and the same training and test tasks.

    python scripts/compare_inner_rates.py maml --json benchmarks/schedules.json
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from inner_schedule import Kind, make_inner
from maml import (
    TEST_SEED,
    VALIDATION_SEED,
    Batch,
    Loss,
    MetaLearning,
    SinusoidConfig,
    adapt,
    maml_loss,
)
from reptile import reptile_loss
from schedule_report import write_json
from torch import Tensor

import metaopt as mo
from metaopt._functional import Params
from metaopt.extras import extra
from metaopt.tasks.episode import Episode
from metaopt.tasks.sinusoid import Sinusoids, sinusoid_mlp
from optimizers import SGD

with extra("scripts/compare_inner_rates.py"):
    import command_line
    import tyro
    from scipy.special import stdtrit
    from tabulate import tabulate

LOSSES = {"maml": maml_loss, "reptile": reptile_loss}
FIRST_TUNING_SEED = 1000
TEST_QUERIES = 100


@dataclass(frozen=True)
class Config:
    """Sine waves; what is tuned is tuned on validation tasks, and all is tested on others."""

    algorithm: tyro.conf.Positional[Literal["maml", "reptile"]]
    """Method that trains the initialisation."""
    kinds: tuple[Kind, ...] = ()
    """Schedules that all tensors share."""
    per_tensor: tuple[Kind, ...] = ("gp",)
    """Schedules of which each tensor of the network has its own."""
    shots: int = 10
    """Points to adapt on."""
    inner_steps: int = 5
    """Gradient steps of the adaptation, in training and in the test."""
    rates: tuple[float, ...] = (0.0025, 0.005, 0.01, 0.02, 0.04)
    """Constant rates; the best is also where the schedules start."""
    schedule_lrs: tuple[float, ...] = (0.003, 0.01)
    """Step sizes of the outer Adam for the schedule, of which the best is taken."""
    max_steps: int = 6000
    """Meta-gradients."""
    tuning_seeds: int = 2
    """Trainings by which the constant rate and the schedule's step size are chosen."""
    seeds: int = 10
    """Trainings of each that are reported."""
    first_seed: int = 0
    """Seed of the first of them."""
    test_tasks: int = 1000
    """Tasks in the test."""
    compile: bool = True
    """Compile the meta-gradient."""
    out: Path = Path("runs/inner-rates")
    """Folder for the weights and events."""
    json: Path | None = None
    """A file that the figures are written to."""

    def __post_init__(self) -> None:
        if self.seeds < 2 or self.tuning_seeds < 1:
            raise ValueError(
                "`seeds` must be at least 2, for an interval over trainings, and `tuning_seeds` at "
                f"least 1, got {self.seeds} and {self.tuning_seeds}."
            )


class Rate(NamedTuple):
    """A constant inner rate (of the kind "none"), or a schedule that starts at it."""

    kind: Kind
    per_tensor: bool
    start: float
    schedule_lr: float = 0.0

    def __str__(self) -> str:
        if self.kind == "none":
            return f"constant, {self.start:g}"
        share = "one for each tensor" if self.per_tensor else "one for all tensors"
        return f"{self.kind}, {share}, outer rate {self.schedule_lr:g}"


class Errors(NamedTuple):
    """Squared errors after the adaptation, [seeds, tasks], and CPU seconds a training."""

    validation: Tensor
    test: Tensor
    seconds: float


class Training(NamedTuple):
    """A training, and what its test needs."""

    meta: MetaLearning
    loss: Loss
    inner: SGD


def begin(config: Config, rate: Rate, seed: int, *, compile: bool = False) -> Training:
    """Return a training at its start."""
    torch.manual_seed(seed)
    model = sinusoid_mlp()
    net = mo.functional(model)

    def loss(params: Params, batch: Batch) -> Tensor:
        x, y = batch
        return F.mse_loss(net(params, x), y)

    options = SinusoidConfig(
        shots=config.shots,
        inner_steps=config.inner_steps,
        inner_lr=rate.start,
        schedule_lr=rate.schedule_lr,
        seed=seed,
        out=config.out,
    )
    names = net.params if rate.per_tensor else ()
    inner = make_inner(rate.kind, rate.start, config.inner_steps, names, seed)
    task_loss = LOSSES[config.algorithm](loss, options, inner)
    sample = partial(
        Sinusoids().sample, tasks=options.meta_batch, shots=config.shots, queries=options.queries
    )
    meta = MetaLearning(model, task_loss, sample, options, inner, compile=compile)
    return Training(meta, loss, inner)


@cache
def compile_once(config: Config, rate: Rate) -> Training:
    """Return a training that all seeds and outer rates share: each loads its own state into it."""
    return begin(config, rate, 0, compile=config.compile)


def train_and_test(config: Config, rate: Rate, seeds: Sequence[int]) -> Errors:
    """Train from each seed, and return squared errors after the adaptation.

    A training that meets a loss that is not finite has the error inf.
    """
    started = time.process_time()
    meta, loss, inner = compile_once(config, rate._replace(schedule_lr=0.0))

    def one(task: Episode) -> Tensor:
        (adapted,) = adapt(loss, inner, (config.inner_steps,), meta.net.params, task)
        return loss(adapted, task.query)

    draw = partial(
        Sinusoids().sample, tasks=config.test_tasks, shots=config.shots, queries=TEST_QUERIES
    )
    rows = []
    for seed in seeds:
        meta.load_state_dict(begin(config, rate, seed).meta.state_dict())
        if not train(meta, config.max_steps):
            rows.append(torch.full((2, config.test_tasks), math.inf))
            continue
        with torch.no_grad():
            errors = [
                torch.func.vmap(one)(draw(torch.Generator().manual_seed(number)))
                for number in (VALIDATION_SEED, TEST_SEED)
            ]
        rows.append(torch.stack(errors))
    validation, test = torch.stack(rows, dim=1)
    return Errors(validation, test, (time.process_time() - started) / len(seeds))


def train(meta: MetaLearning, steps: int) -> bool:
    """Train, the last quarter with a tenth of the rates; return False if a loss is not finite."""
    for step in range(steps):
        if step == steps * 3 // 4:
            for group in meta.outer.param_groups:
                group["lr"] /= 10
        try:
            meta.step()
        except mo.NonFiniteError:
            return False
    return True


def interval(values: Tensor) -> tuple[float, float]:
    """Return the mean of values, one of each training, and half of its 95 % t interval."""
    count = len(values)
    half = float(stdtrit(count - 1, 0.975)) * float(values.std()) / math.sqrt(count)
    return float(values.mean()), half


def describe(errors: Tensor, reference: Tensor) -> dict[str, Any]:
    """Return means of errors [seeds, tasks] and paired differences, with intervals over seeds."""
    each, other = errors.mean(1), reference.mean(1)
    (error, margin), (difference, paired) = interval(each), interval(each - other)
    return {
        "error": error,
        "±": margin,
        "difference": difference,
        "± difference": paired,
        "seeds": [round(float(one), 4) for one in each],
    }


def choose(config: Config, rates: Sequence[Rate], found: dict[str, list[float]]) -> Rate:
    """Return the rate with the least validation error over the tuning seeds; `found` has all.

    A single one needs no trainings.
    """
    if len(rates) == 1:
        return rates[0]
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + config.tuning_seeds)
    means = []
    for rate in rates:
        each = train_and_test(config, rate, seeds).validation.mean(1)
        found[str(rate)] = [round(float(one), 4) for one in each]
        means.append(float(each.mean()))
        print(f"tuning: {rate}: {found[str(rate)]}", flush=True)
    return rates[means.index(min(means))]


def main(config: Config) -> None:
    torch.set_num_threads(1)
    config.out.mkdir(parents=True, exist_ok=True)
    tuning: dict[str, list[float]] = {}
    constant = choose(config, [Rate("none", False, rate) for rate in config.rates], tuning)
    jobs = [(kind, False) for kind in config.kinds] + [(kind, True) for kind in config.per_tensor]
    chosen = [
        choose(config, [Rate(*job, constant.start, lr) for lr in config.schedule_lrs], tuning)
        for job in jobs
    ]
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    reference, rows = None, {}
    for rate in [constant, *chosen]:
        errors = train_and_test(config, rate, seeds)
        reference = errors.test if reference is None else reference
        rows[str(rate)] = describe(errors.test, reference)
        rows[str(rate)]["CPU seconds a training"] = round(errors.seconds, 1)
        print(rate, rows[str(rate)], flush=True)
    print(tabulate([[name, *row.values()] for name, row in rows.items()], floatfmt=".4f"))
    if config.json:
        key = f"{config.algorithm}, {config.shots} shots, {config.inner_steps} steps, "
        key += f"seeds {seeds[0]} to {seeds[-1]}"
        write_json(config.json, key, asdict(config), {"tuning": tuning, "rows": rows})


if __name__ == "__main__":
    command_line.run(main, Config, __doc__)
