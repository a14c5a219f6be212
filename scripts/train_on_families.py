"""Train a learned optimizer that carries over, on small networks drawn anew, by evolution.

    python scripts/train_on_families.py --out runs/small

docs/pages/results/learned-optimizers.md has what it reaches on families that training never saw.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch

import metaopt as mo
from metaopt.extras import extra
from metaopt.meta_training.evaluation import VALIDATION_SEED
from metaopt.meta_training.groups import draw_family, draw_horizon
from optimizers import EMA, Adam, ControlledMLP, Cosine

with extra("scripts/train_on_families.py"):
    import command_line


@dataclass(frozen=True)
class Config:
    """Noise-reusing evolution strategies on a mixture of small MLPs: digits, random teachers."""

    steps: int = 450
    """Outer steps."""
    outer_lr: float = 0.005
    """Learning rate of the outer Adam, with cosine decay to a twentieth."""
    average: float = 0.95
    """Decay of the average of the weights, which is validated and kept."""
    groups: int = 6
    """Families that are trained on at the same time."""
    pairs: int = 16
    """Pairs of perturbed optimizers in each of these families."""
    window: int = 20
    """Inner steps between outer steps."""
    std: float = 0.03
    """Standard deviation of the noise."""
    horizon: tuple[int, int] = (50, 400)
    """Fewest and most inner steps of an episode."""
    late: float = 3.0
    """Weight of the last fifth of an episode."""
    clip: float = 280.0
    """Largest norm of one pair's estimate."""
    orthogonal: bool = True
    """Make directions of matrices orthogonal, which suits small layers."""
    validate_every: int = 30
    """Outer steps between validations; the weights that validate best are kept."""
    validation: int = 18
    """Families to validate on, 8 tasks of each."""
    seed: int = 0
    """Seed of the initial weights and of the training tasks."""
    threads: int = 1
    """Threads for torch."""
    out: Path = Path("runs/small")
    """Folder for the weights, the configuration, checkpoints and TensorBoard events."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""

    def __post_init__(self) -> None:
        for name in ("steps", "outer_lr", "validate_every", "validation", "threads"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    families = mo.tasks.small_networks()
    optimizer = ControlledMLP(orthogonal=config.orthogonal, seed=config.seed)
    objective = mo.MeanLoss(mo.Relative(), late=config.late)
    nres = mo.NRES(config.std, config.pairs, window=config.window, objective=objective)
    rate = Cosine(config.outer_lr, config.steps, final=config.outer_lr / 20)
    training = mo.MetaTraining(
        optimizer,
        families,
        estimator=mo.Groups(nres, config.groups),
        outer=EMA(config.average, Adam(rate, (0.9, 0.99))),
        horizon=config.horizon,
        clip=config.clip,
        seed=config.seed,
    )
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    kept = [
        (draw_family(families, generator), draw_horizon(config.horizon, generator))
        for _ in range(config.validation)
    ]

    def validate() -> float:
        """Return the mean objective over families that training may have seen the like of."""
        judged, values = training.evaluated(), []
        for family, horizon in kept:
            report = mo.evaluate(
                {"": judged}, family, horizon=horizon, seeds=8, seed=VALIDATION_SEED
            )
            values += [objective.of(losses) for losses in report.curves[""]]
        return float(torch.stack(values).mean())

    weights = sum(p.numel() for p in optimizer.parameters())
    print(
        f"Training {type(optimizer).__name__} ({weights} weights) on small networks, "
        f"{config.groups} x {config.pairs} pairs."
    )
    started = time.process_time()
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
    print(
        f"Trained for {time.process_time() - started:.0f} s of CPU time; mean validation objective "
        f"{trainer.best:.4f} at step {trainer.best_step}. Weights: "
        f"{config.out / 'weights.safetensors'}"
    )


if __name__ == "__main__":
    command_line.run(main, Config)
