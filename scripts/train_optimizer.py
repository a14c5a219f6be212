"""Train a learned optimizer and save its weights.

python scripts/train_optimizer.py --optimizer lstm --task quadratics
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import metaopt as mo
from metaopt.extras import extra
from metaopt.meta_training.evaluation import VALIDATION_SEED
from optimizers import Adam, Cosine, LSTMOptimizer, MLPOptimizer

with extra("scripts/train_optimizer.py"):
    import tyro

OPTIMIZERS = {"mlp": MLPOptimizer, "lstm": LSTMOptimizer}
# Each task with the number of steps of an episode.
TASKS = {
    "digits": (mo.tasks.DigitsMLP(hidden=(32,)), 50),
    "digits-deep": (mo.tasks.DigitsMLP(hidden=(64, 32)), 100),
    "quadratics": (mo.tasks.Quadratics(dimension=10), 100),
}


@dataclass(frozen=True)
class Config:
    """Train a learned optimizer on its own training runs, by backpropagation or evolution."""

    optimizer: Literal["mlp", "lstm"] = "mlp"
    """Per-parameter MLP, or coordinatewise LSTM."""
    task: Literal["digits", "digits-deep", "quadratics"] = "digits"
    """What it is trained on."""
    horizon: int | None = None
    """Inner steps per episode; by default the task's own."""
    estimator: Literal["backprop", "es", "pes", "nres"] = "backprop"
    """How the meta-gradient is estimated."""
    window: int | None = None
    """The number of steps in a window of truncated backpropagation, PES or NRES; by default whole
    episodes for the first, and 20 for the others."""
    std: float = 0.01
    """Standard deviation of the noise of ES, PES and NRES."""
    second_order: bool = False
    """Differentiate through the inner gradients too."""
    batch: int = 8
    """Episodes per outer step, or pairs of episodes."""
    hidden_size: int | None = None
    """Width of the learned optimizer; by default its own."""
    steps: int = 140
    """Outer steps."""
    outer_lr: float = 0.01
    """Learning rate of the outer Adam, with cosine decay to a tenth."""
    validate_every: int = 20
    """Outer steps between validations; the weights that validate best are kept."""
    seed: int = 0
    """Of the initial weights and of the training tasks."""
    threads: int = 1
    """Threads for torch; these networks are too small for more to help."""
    out: Path = Path("runs/optimizer")
    """Folder for the weights, the configuration and TensorBoard events."""

    def __post_init__(self) -> None:
        for name in (
            "horizon",
            "window",
            "std",
            "batch",
            "hidden_size",
            "steps",
            "outer_lr",
            "validate_every",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")


def make_estimator(config: Config) -> mo.Estimator:
    if config.estimator == "es":
        return mo.ES(config.std, config.batch)
    if config.estimator != "backprop":
        kind = mo.PES if config.estimator == "pes" else mo.NRES
        return kind(config.std, config.batch, window=config.window or 20)
    rule = mo.Backprop() if config.second_order else mo.FirstOrder()
    if config.window is None:
        return mo.FullUnroll(config.batch, rule)
    return mo.TruncatedBackprop(config.window, config.batch, rule)


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    family, horizon = TASKS[config.task]
    horizon = horizon if config.horizon is None else config.horizon
    width = {} if config.hidden_size is None else {"hidden_size": config.hidden_size}
    optimizer = OPTIMIZERS[config.optimizer](**width, seed=config.seed)
    estimator = make_estimator(config)
    outer = Adam(lr=Cosine(config.outer_lr, config.steps, final=config.outer_lr / 10))
    training = mo.MetaTraining(
        optimizer, family, estimator=estimator, outer=outer, horizon=horizon, seed=config.seed
    )

    def validate() -> float:
        return mo.evaluate(
            {"": optimizer}, family, horizon=horizon, seeds=32, seed=VALIDATION_SEED
        ).mean("")

    weights = sum(p.numel() for p in optimizer.parameters())
    name = type(optimizer).__name__
    print(
        f"Training {name} ({weights} weights) on {config.task}, {config.batch} episodes of "
        f"{horizon} steps at a time."
    )
    started = time.perf_counter()
    trainer = mo.Trainer(
        training,
        max_steps=config.steps,
        logger=mo.TensorBoardLogger(config.out),
        validate=validate,
        validate_every=config.validate_every,
    )
    try:
        trainer.fit()
    finally:  # also if interrupted: the best so far
        optimizer.save(config.out / "weights.safetensors")
    (config.out / "config.json").write_text(json.dumps(asdict(config), default=str, indent=2))
    print(
        f"Trained for {time.perf_counter() - started:.0f} s; mean validation loss "
        f"{trainer.best:.4f} at step {trainer.best_step}."
    )
    print(
        f"Weights: {config.out / 'weights.safetensors'}   Curves: tensorboard --logdir {config.out}"
    )


if __name__ == "__main__":
    main(tyro.cli(Config))
