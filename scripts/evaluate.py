"""Compare learned optimizers with tuned hand-designed ones on tasks that training never saw.

python scripts/evaluate.py --weights runs/optimizer/weights.safetensors --task digits
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import metaopt as mo
from metaopt.extras import extra
from optimizers import SGD, Adam, RMSprop

with extra("scripts/evaluate.py"):
    import tyro
    from train_optimizer import TASKS

HAND_DESIGNED: dict[str, Callable[[float], mo.Optimizer]] = {
    "Adam": lambda lr: Adam(lr),
    "SGD, momentum 0.9": lambda lr: SGD(lr, momentum=0.9),
    "SGD, Nesterov 0.9": lambda lr: SGD(lr, momentum=0.9, nesterov=True),
    "RMSprop": lambda lr: RMSprop(lr),
}


@dataclass(frozen=True)
class Config:
    """Tune hand-designed optimizers on validation tasks, and compare them on test tasks.

    The learned ones run on the same test tasks.
    """

    weights: tuple[Path, ...] = ()
    """Files that train_optimizer.py or train_schedule.py wrote."""
    task: Literal["digits", "digits-deep", "quadratics"] = "digits"
    """What they are compared on; it may differ from what they were trained on."""
    horizon: int | None = None
    """Inner steps; by default the task's own."""
    seeds: int = 64
    """Test tasks."""
    tuning_seeds: int = 32
    """Validation tasks on which learning rates are chosen."""
    grid: tuple[float, ...] = (
        0.001,
        0.003,
        0.005,
        0.01,
        0.02,
        0.03,
        0.05,
        0.07,
        0.1,
        0.2,
        0.3,
        0.5,
        1.0,
        2.0,
    )
    """Learning rates tried."""
    threads: int = 1
    """Threads for torch."""
    out: Path = Path("runs/evaluation")
    """Folder for the plot, the table and TensorBoard events."""

    def __post_init__(self) -> None:
        for name in ("horizon", "seeds", "tuning_seeds", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
        if not self.grid or min(self.grid) <= 0:
            raise ValueError(f"`grid` must hold positive learning rates, got {self.grid}.")


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    family, horizon = TASKS[config.task]
    horizon = horizon if config.horizon is None else config.horizon
    optimizers: dict[str, mo.Optimizer] = {}
    for path in config.weights:
        learned = mo.Optimizer.load(path)
        optimizers[
            f"learned: {type(learned).__name__}" + (f" ({path})" if len(config.weights) > 1 else "")
        ] = learned
    for name, make in tqdm(HAND_DESIGNED.items(), desc="tuning", mininterval=0.5):
        lr, _ = mo.tune(make, config.grid, family, horizon=horizon, seeds=config.tuning_seeds)
        optimizers[f"{name}, lr {lr:g}"] = make(lr)
    report = mo.evaluate(optimizers, family, horizon=horizon, seeds=config.seeds)

    title = f"{config.task}: {horizon} steps from {config.seeds} fresh initialisations"
    plot = config.out / f"{config.task}.png"
    report.plot(plot, title)
    print(f"\n{title}, none seen in training or tuning\n{report.table()}")
    (config.out / f"{config.task}.txt").write_text(report.table() + "\n")
    for name, losses in report.curves.items():
        logger = mo.TensorBoardLogger(
            config.out / "evaluation" / name.replace(" ", "-").replace("/", "-")
        )
        for step, loss in enumerate(losses.mean(0).tolist()):
            logger.log(step, {f"{config.task}/loss": loss})
        logger.close()
    print(f"Plot: {plot}   Curves: tensorboard --logdir {config.out}")


if __name__ == "__main__":
    main(tyro.cli(Config))
