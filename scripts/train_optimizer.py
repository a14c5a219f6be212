"""Train a learned optimizer and save its weights.

    python scripts/train_optimizer.py --optimizer lstm --task quadratics

The defaults are the recipe for this optimizer and task, where there is one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

import metaopt as mo
from metaopt.extras import extra
from metaopt.meta_training.evaluation import VALIDATION_SEED
from optimizers import EMA, RNNMLP, AdafactorMLP, Adam, Cosine, LSTMOptimizer, MLPOptimizer, NNAdam

with extra("scripts/train_optimizer.py"):
    import command_line

OPTIMIZERS: dict[str, Any] = {
    "mlp": MLPOptimizer,
    "lstm": LSTMOptimizer,
    "adafactor-mlp": AdafactorMLP,
    "rnn-mlp": RNNMLP,
    "nn-adam": NNAdam,
}
# Each task with the number of steps of an episode.
TASKS = {
    "digits": (mo.tasks.DigitsMLP(hidden=(32,)), 50),
    "digits-deep": (mo.tasks.DigitsMLP(hidden=(64, 32)), 100),
    "quadratics": (mo.tasks.Quadratics(dimension=10), 100),
    "quadratics-20": (mo.tasks.Quadratics(dimension=20), 100),
    "quadratics-50": (mo.tasks.Quadratics(dimension=50), 100),
}
VALIDATION_TASKS = {"quadratics": 512}  # 32 of the others
# The best known settings for backpropagation, by optimizer and task; docs/pages/results has why.
RECIPES: dict[tuple[str, str], dict[str, Any]] = {
    ("lstm", "quadratics"): {
        "window": 5,
        "second_order": True,
        "clip": 1.0,
        "batch": 64,
        "hidden_size": 32,
        "steps": 2000,
        "validate_every": 500,
        "finish": 800,
        "finish_window": 20,
    },
    ("mlp", "digits"): {
        "window": 10,
        "second_order": True,
        "steps": 500,
        "validate_every": 50,
        "finish": 120,
    },
}
OTHERWISE = {
    "second_order": False,
    "batch": 8,
    "steps": 140,
    "finish": 0,
    "outer_lr": 0.01,
    "average": 0.98,
    "validate_every": 20,
}


@dataclass(frozen=True)
class Config:
    """Train a learned optimizer on its own training runs, by backpropagation or evolution."""

    optimizer: Literal["mlp", "lstm", "adafactor-mlp", "rnn-mlp", "nn-adam"] = "mlp"
    """Per-parameter MLP, coordinatewise LSTM, the MLP with Adafactor's features, an LSTM for each
    tensor above an MLP, or Adam with a network that sets its rate and betas."""
    task: Literal["digits", "digits-deep", "quadratics", "quadratics-20", "quadratics-50"] = (
        "digits"
    )
    """Task that the optimizer is trained on."""
    horizon: int | None = None
    """Inner steps per episode; by default the task's own."""
    estimator: Literal["backprop", "es", "pes", "nres"] = "backprop"
    """How the meta-gradient is estimated."""
    window: int | None = None
    """Number of inner steps in a window of truncated backpropagation, PES or NRES. By default that
    of the recipe for this optimizer and task; without a recipe, whole episodes for backpropagation
    and 20 steps for the others."""
    std: float = 0.01
    """Standard deviation of the noise of ES, PES and NRES."""
    second_order: bool | None = None
    """Differentiate through the inner gradients too; by default the recipe's choice; else no."""
    batch: int | None = None
    """Episodes per outer step, or pairs of episodes. Here and below, the default is that of the
    recipe for this optimizer and task; without a recipe, 8."""
    clip: float | None = None
    """With --second-order True: largest entry of the cotangent of the parameters between inner
    steps, see `Backprop`; without a recipe, no limit."""
    hidden_size: int | None = None
    """Width of the learned optimizer; by default its own."""
    steps: int | None = None
    """Outer steps; without a recipe, 140."""
    finish: int | None = None
    """Further outer steps with longer windows and .3 of the learning rate, from the weights that
    validated best, because short windows are shortsighted; without a recipe, none."""
    finish_window: int | None = None
    """Number of inner steps in a window of these; without a recipe, the whole episode."""
    outer_lr: float | None = None
    """Learning rate of the outer Adam, with cosine decay to a tenth; without a recipe, .01."""
    average: float | None = None
    """Decay of the average of the weights, which is validated and kept; without a recipe, .98."""
    validate_every: int | None = None
    """Outer steps between validations; the best weights are kept; without a recipe, 20."""
    start: Path | None = None
    """File of weights to begin with, from an earlier training; by default random weights."""
    seed: int = 0
    """Seed of the initial weights and of the training tasks."""
    threads: int = 1
    """Threads for torch; these networks are too small for more to help."""
    out: Path = Path("runs/optimizer")
    """Folder for the weights, the configuration, checkpoints and TensorBoard events."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        recipe = RECIPES.get((self.optimizer, self.task), {})
        for name, value in (OTHERWISE | (recipe if self.estimator == "backprop" else {})).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        window = recipe.get("window", 0)
        if self.window == window and (self.horizon or math.inf) < window:
            object.__setattr__(self, "window", None)  # of the recipe: an episode is shorter
        for name in (
            "horizon",
            "window",
            "std",
            "batch",
            "clip",
            "hidden_size",
            "steps",
            "finish_window",
            "outer_lr",
            "validate_every",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if self.finish < 0:
            raise ValueError(f"`finish` must be at least 0, got {self.finish}.")


def make_estimator(config: Config) -> mo.Estimator:
    if config.estimator == "es":
        return mo.ES(config.std, config.batch)
    if config.estimator != "backprop":
        kind = mo.PES if config.estimator == "pes" else mo.NRES
        return kind(config.std, config.batch, window=config.window or 20)
    rule = mo.Backprop(clip=config.clip) if config.second_order else mo.FirstOrder()
    if config.window is None:
        return mo.FullUnroll(config.batch, rule)
    return mo.TruncatedBackprop(config.window, config.batch, rule)


def find_family(config: Config) -> tuple[mo.TaskFamily, Config]:
    """Return the tasks to train on, and the configuration of what they are to the estimator.

    To the LSTM, which treats all coordinates alike, many quadratics are one with more coordinates.
    """
    family, _ = TASKS[config.task]
    is_one = config.optimizer == "lstm" and config.estimator == "backprop"
    if is_one and isinstance(family, mo.tasks.Quadratics):
        return replace(family, functions=config.batch), replace(config, batch=1)
    return family, config


def train(config: Config, optimizer: mo.Optimizer) -> tuple[mo.Optimizer, float]:
    """Return (the averaged weights that validated best, that loss), and write them to a file."""
    family, horizon = TASKS[config.task]
    horizon = horizon if config.horizon is None else config.horizon
    trained_on, seen = find_family(config)
    rate = Cosine(config.outer_lr, config.steps, final=config.outer_lr / 10)
    outer = EMA(config.average, Adam(rate))
    training = mo.MetaTraining(
        optimizer,
        trained_on,
        estimator=make_estimator(seen),
        outer=outer,
        horizon=horizon,
        seed=config.seed,
    )
    seeds = VALIDATION_TASKS.get(config.task, 32)

    def validate() -> float:
        return mo.evaluate(
            {"": training.evaluated()}, family, horizon=horizon, seeds=seeds, seed=VALIDATION_SEED
        ).mean("")

    print(
        f"{config.steps} outer steps of {config.batch} episodes of {horizon} steps, in windows of "
        f"{config.window or horizon}."
    )
    trainer = mo.Trainer(
        training,
        max_steps=config.steps,
        logger=mo.TensorBoardLogger(config.out),
        validate=validate,
        validate_every=config.validate_every,
        **command_line.saved(config),
        checkpoint_every=config.validate_every,
    )
    try:
        trainer.fit()
    finally:  # also if interrupted: the best so far
        training.evaluated().save(config.out / "weights.safetensors")
    return training.evaluated(), trainer.best


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    width = {} if config.hidden_size is None else {"hidden_size": config.hidden_size}
    kind, start = OPTIMIZERS[config.optimizer], config.start
    optimizer = kind(**width, seed=config.seed) if start is None else kind.load(start)
    weights = sum(p.numel() for p in optimizer.parameters())
    print(f"Training {type(optimizer).__name__} ({weights} weights) on {config.task}.")
    phases = [config]
    if config.finish:
        horizon = config.horizon or TASKS[config.task][1]
        phases.append(
            replace(
                config,
                window=min(config.finish_window or horizon, horizon),
                steps=config.finish,
                outer_lr=0.3 * config.outer_lr,
                validate_every=max(1, config.finish // 6),
                out=config.out / "finish",
            )
        )
    started = time.process_time()
    for phase in phases:
        optimizer, best = train(phase, optimizer)
    optimizer.save(config.out / "weights.safetensors")
    print(
        f"Trained for {time.process_time() - started:.0f} s of CPU time; mean validation loss "
        f"{best:.4f}."
    )
    print(
        f"Weights: {config.out / 'weights.safetensors'}   Curves: tensorboard --logdir {config.out}"
    )


if __name__ == "__main__":
    command_line.run(main, Config)
