"""Train a learning-rate schedule through the inner loop.

    python scripts/train_schedule.py

It is compared with tuned constant and cosine rates.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from schedule_report import (
    choose,
    compare,
    final,
    mean,
    observed_rates,
    plot,
    table,
    tail,
    write_json,
)
from torch import Tensor

import metaopt as mo
from metaopt.extras import extra
from metaopt.meta_training.evaluation import VALIDATION_SEED
from optimizers import (
    SGD,
    Adam,
    AttentionSchedule,
    Cosine,
    GPSchedule,
    LSTMSchedule,
    MLPSchedule,
    PolicySchedule,
    Warmup,
)

with extra("scripts/train_schedule.py"):
    import command_line

Kind = Literal["lstm", "mlp", "gp", "attention", "policy"]
KINDS: dict[Kind, type[mo.Schedule]] = {
    "lstm": LSTMSchedule,
    "mlp": MLPSchedule,
    "gp": GPSchedule,
    "attention": AttentionSchedule,
    "policy": PolicySchedule,
}
ROLLOUTS = 8  # of the policy, on each task


@dataclass(frozen=True)
class Config:
    """Train a schedule on digits, with the exact gradient through every inner step.

    The policy is trained by REINFORCE, from losses alone.
    """

    kind: tuple[Kind, ...] = ("lstm",)
    """Kind of schedule; several are trained one after the other."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer whose learning rate is scheduled."""
    objective: Literal["mean", "final"] = "mean"
    """Objective of training, tuning and selection: the mean training loss of all steps, or of the
    last tenth of them."""
    start: Literal["constant", "cosine"] = "constant"
    """Schedule before training: the rate `initial`, or a warm-up to it over a twentieth of the
    steps and cosine decay."""
    horizon: int = 100
    """Inner steps per episode."""
    momentum: float = 0.0
    """Momentum of SGD, for all schedules."""
    initial: float = 0.5
    """Rate at which the schedule starts before it is trained."""
    steps: int = 120
    """Outer steps."""
    outer_lr: float = 0.01
    """Learning rate of the outer Adam, with cosine decay to a tenth."""
    batch: int = 4
    """Episodes per outer step."""
    clip: float = 1.0
    """Largest norm of the meta-gradient of an episode."""
    validate_every: int = 10
    """Outer steps between validations; the schedule that validates best is kept."""
    validation_seeds: int = 64
    """Tasks of a validation."""
    seeds: int = 64
    """Test tasks."""
    grid: tuple[float, ...] = (
        0.02,
        0.05,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.6,
        0.8,
        1.0,
        1.3,
        1.6,
        2.0,
        3.0,
    )
    """Rates tried for the constant and the cosine schedule."""
    warmups: tuple[int, ...] = (0,)
    """Lengths of the warm-up tried with each rate of the cosine, in steps."""
    transfer: tuple[int, ...] = ()
    """Widths of the hidden layers of another network on which it is also judged."""
    scales: tuple[float, ...] = (0.5, 0.7, 1.0)
    """Factors on the learned schedule tried on that network."""
    seed: int = 0
    """Seed of the initial weights and of the training tasks."""
    threads: int = 1
    """Threads for torch."""
    out: Path = Path("runs/schedule")
    """Folder for the weights, the plot, checkpoints and TensorBoard events."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    json: Path | None = None
    """A file that the figures are written to, beside those of other kinds."""

    def __post_init__(self) -> None:
        for name in (
            "horizon",
            "initial",
            "steps",
            "outer_lr",
            "batch",
            "clip",
            "validate_every",
            "validation_seeds",
            "seeds",
            "threads",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not self.grid or min(self.grid) <= 0:
            raise ValueError(f"`grid` must hold positive learning rates, got {self.grid}.")
        if not self.warmups or min(self.warmups) < 0:
            raise ValueError(f"`warmups` must hold numbers of steps, got {self.warmups}.")

    def make(self, lr: Any) -> mo.Optimizer:
        """Return the optimizer with this learning rate."""
        return Adam(lr) if self.optimizer == "adam" else SGD(lr, self.momentum)

    def score(self, losses: Tensor) -> Tensor:
        """Return the objective of losses [..., steps]."""
        return mean(losses) if self.objective == "mean" else final(losses)


@dataclass(frozen=True)
class FinalLoss:
    """J = the mean loss of the last tenth of an episode."""

    is_bounded: bool = False

    def part(self, window: mo.Window, loss: Any) -> Tensor:
        """Return the window's part of the mean."""
        count = tail(window.horizon)
        steps = window.start + torch.arange(len(window.losses))
        return torch.where(steps >= window.horizon - count, window.losses, 0).sum() / count


def make_estimator(config: Config, kind: Kind) -> mo.Estimator:
    if kind == "policy":
        last = tail(config.horizon) if config.objective == "final" else None
        return mo.Reinforce(max(1, config.batch // 4), ROLLOUTS, last)
    objective = FinalLoss() if config.objective == "final" else mo.MeanLoss()
    return mo.FullUnroll(config.batch, mo.Backprop(), objective=objective)


def tune(config: Config, family: mo.TaskFamily) -> dict[str, mo.Optimizer]:
    """Return the best constant and the best cosine, the latter first."""

    def cosine(lr: float, warmup: int) -> mo.Optimizer:
        wave = Cosine(lr, config.horizon)
        return config.make(Warmup(wave, warmup) if warmup else wave)

    count = len(config.grid)
    cosines = {
        f"cosine, best of {count * len(config.warmups)}: {lr:g}, warm-up {warmup}": cosine(
            lr, warmup
        )
        for lr in config.grid
        for warmup in config.warmups
    }
    constants = {f"constant, best of {count}: {lr:g}": config.make(lr) for lr in config.grid}
    found = {}
    for candidates in (cosines, constants):
        name = choose(candidates, family, config.horizon, config.score)
        found[name] = candidates[name]
    return found


def train(config: Config, kind: Kind, family: mo.TaskFamily) -> mo.Optimizer:
    """Return the optimizer with the trained schedule."""
    initial: Any = config.initial
    if config.start == "cosine":
        warmup = max(1, config.horizon // 20)
        initial = Warmup(Cosine(initial, config.horizon), warmup)
    # the Gaussian process has nothing random
    seed = {} if kind == "gp" else {"seed": config.seed}
    learned = config.make(KINDS[kind](initial, config.horizon, **seed))
    training = mo.MetaTraining(
        learned,
        family,
        estimator=make_estimator(config, kind),
        outer=Adam(Cosine(config.outer_lr, config.steps, final=config.outer_lr / 10)),
        horizon=config.horizon,
        clip=config.clip,
        seed=config.seed,
    )

    def validate() -> float:
        seen = mo.evaluate(
            {"": learned},
            family,
            horizon=config.horizon,
            seeds=config.validation_seeds,
            seed=VALIDATION_SEED,
        )
        return float(config.score(seen.curves[""]).mean())

    trainer = mo.Trainer(
        training,
        max_steps=config.steps,
        logger=mo.TensorBoardLogger(config.out / kind),
        label=kind,
        validate=validate,
        validate_every=config.validate_every,
        **command_line.saved(config, kind),
        checkpoint_every=config.validate_every,
    )
    try:
        trainer.fit()
    finally:  # also if interrupted: the best so far
        learned.save(config.out / f"{kind}.safetensors")
    return learned


def carry_over(config: Config, learned: dict[str, mo.Optimizer]) -> dict[str, mo.Optimizer]:
    """Return the best cosine on another network, and each schedule with its best scale there."""
    family = mo.tasks.DigitsMLP(hidden=config.transfer)
    cosine, best = next(iter(tune(config, family).items()))
    found = {cosine: best}
    for kind, optimizer in learned.items():
        scaled = {}
        for scale in config.scales:
            copied = copy.deepcopy(optimizer)
            with torch.no_grad():
                copied.lr.log_initial += math.log(scale)
            scaled[f"{kind}, best of {len(config.scales)}: x {scale:g}"] = copied
        name = choose(scaled, family, config.horizon, config.score)
        found[name] = scaled[name]
    return found


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    family = mo.tasks.DigitsMLP()
    tuned = tune(config, family)
    reference = next(iter(tuned))
    learned, seconds = {}, {}
    for kind in config.kind:
        started = time.process_time()
        learned[f"learned: {kind}"] = train(config, kind, family)
        seconds[f"learned: {kind}"] = round(time.process_time() - started, 1)
    optimizers = {**learned, **tuned}
    report = mo.evaluate(optimizers, family, horizon=config.horizon, seeds=config.seeds)
    print(
        f"\n{config.optimizer} on digits, {config.horizon} steps from {config.seeds} fresh "
        f"initialisations none of which was seen before; ratios and z (of paired differences) "
        f"against the best cosine; CPU seconds of training: {seconds}"
    )
    rows = compare(report, reference)
    print(table(rows))
    entry: dict[str, Any] = {"training CPU seconds": seconds, "test": rows}
    if config.transfer:
        other = carry_over(config, learned)
        rows = compare(
            mo.evaluate(
                other,
                mo.tasks.DigitsMLP(hidden=config.transfer),
                horizon=config.horizon,
                seeds=config.seeds,
            ),
            next(iter(other)),
        )
        print(f"\nThe same on a network with hidden layers {config.transfer}")
        print(table(rows))
        entry["transfer"] = rows
    if config.json:
        kinds = " ".join(config.kind)
        key = f"{config.optimizer}, {config.objective} loss, {config.horizon} steps: {kinds}"
        write_json(config.json, key, asdict(config), entry)
    rates = {
        name: observed_rates(optimizer, family, config.horizon)
        for name, optimizer in optimizers.items()
    }
    plot(report, rates, config.out / "schedule.png")
    print(f"Plot: {config.out / 'schedule.png'}   Curves: tensorboard --logdir {config.out}")


if __name__ == "__main__":
    command_line.run(main, Config)
