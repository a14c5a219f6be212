"""Train an LSTM learning-rate schedule through the inner loop.

It is compared with tuned constant and cosine rates. python scripts/train_schedule.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.func import vmap

import metaopt as mo
from metaopt.extras import extra
from metaopt.meta_training.evaluation import TEST_SEED, VALIDATION_SEED
from metaopt.meta_training.task import sample_tasks
from optimizers import SGD, Adam, Cosine, LSTMSchedule

with extra("scripts/train_schedule.py"):
    import tyro
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Config:
    """Train the schedule of SGD on digits with the exact gradient through every inner step."""

    horizon: int = 100
    """Inner steps per episode."""
    momentum: float = 0.0
    """Momentum of SGD, for all three schedules."""
    initial: float = 0.5
    """Rate at which the schedule starts before it is trained."""
    steps: int = 120
    """Outer steps."""
    outer_lr: float = 0.01
    """Learning rate of the outer Adam, with cosine decay to a tenth."""
    batch: int = 4
    """Episodes per outer step."""
    validate_every: int = 10
    """Outer steps between validations; the schedule that validates best is kept."""
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
    seed: int = 0
    """Of the initial weights and of the training tasks."""
    threads: int = 1
    """Threads for torch."""
    out: Path = Path("runs/schedule")
    """Folder for the weights, the plot and TensorBoard events."""

    def __post_init__(self) -> None:
        for name in (
            "horizon",
            "initial",
            "steps",
            "outer_lr",
            "batch",
            "validate_every",
            "seeds",
            "threads",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if not self.grid or min(self.grid) <= 0:
            raise ValueError(f"`grid` must hold positive learning rates, got {self.grid}.")


def main(config: Config) -> None:
    torch.set_num_threads(config.threads)
    family = mo.tasks.DigitsMLP()
    learned = SGD(LSTMSchedule(config.initial, config.horizon, seed=config.seed), config.momentum)
    training = mo.MetaTraining(
        learned,
        family,
        estimator=mo.FullUnroll(config.batch, mo.Backprop()),
        outer=Adam(Cosine(config.outer_lr, config.steps, final=config.outer_lr / 10)),
        horizon=config.horizon,
        seed=config.seed,
    )

    def validate() -> float:
        return mo.evaluate(
            {"": learned}, family, horizon=config.horizon, seeds=32, seed=VALIDATION_SEED
        ).mean("")

    logger = mo.TensorBoardLogger(config.out)
    trainer = mo.Trainer(
        training,
        max_steps=config.steps,
        logger=logger,
        validate=validate,
        validate_every=config.validate_every,
    )
    try:
        trainer.fit()
    finally:  # also if interrupted: the best so far
        learned.save(config.out / "weights.safetensors")

    def constant(lr: float) -> SGD:
        return SGD(lr, config.momentum)

    def cosine(lr: float) -> SGD:
        return SGD(Cosine(lr, config.horizon), config.momentum)

    optimizers = {"learned schedule": learned}
    for name, make in {"constant": constant, "cosine": cosine}.items():
        lr, _ = mo.tune(make, config.grid, family, horizon=config.horizon)
        optimizers[f"{name}, best of {len(config.grid)}: {lr:g}"] = make(lr)
    report = mo.evaluate(optimizers, family, horizon=config.horizon, seeds=config.seeds)
    print(
        f"\nSGD on digits, {config.horizon} steps from {config.seeds} fresh initialisations none "
        "of which was seen before"
    )
    print(report.table())
    rates = {
        name: observed_rates(optimizer, family, config.horizon)
        for name, optimizer in optimizers.items()
    }
    plot(report, rates, config.out / "schedule.png")
    print(f"Plot: {config.out / 'schedule.png'}   Curves: tensorboard --logdir {config.out}")


def observed_rates(optimizer: SGD, family: mo.TaskFamily, horizon: int, seeds: int = 16) -> Tensor:
    """Return the learning rate used at each step of `seeds` test runs, [seeds, horizon].

    It is read off as -update / gradient.
    """
    schedule, rates = optimizer.lr, []

    def run(params: mo.tree.Tree, batches: mo.tree.Tree) -> Tensor:
        state = optimizer.init(params)
        for t in range(horizon):
            grads, loss = torch.func.grad_and_value(family.loss)(params, mo.tree.index(batches, t))
            if isinstance(schedule, mo.Schedule):
                rate, _ = schedule(
                    state["schedules"]["lr"],
                    step=state["step"],
                    loss=loss,
                    grads=mo.tree.leaves(grads),
                )
            else:
                rate = schedule
            rates.append(torch.as_tensor(rate))
            updates, state = optimizer(grads, state, params, loss=loss)
            params = mo.apply_updates(params, updates)
        return torch.stack(rates)

    tasks = sample_tasks(family, torch.Generator().manual_seed(TEST_SEED), seeds, horizon)
    with torch.no_grad():
        return vmap(run)(tasks.params, tasks.batches)


def plot(report: mo.Report, rates: dict[str, Tensor], path: Path) -> None:
    """Draw the loss curves beside the rates."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss_axes, rate_axes = figure.subplots(1, 2)
    for name, losses in report.curves.items():
        (line,) = loss_axes.plot(losses.mean(0), label=f"{name} (mean {report.mean(name):.3f})")
        for run in rates[name]:
            rate_axes.plot(run, color=line.get_color(), alpha=0.25, linewidth=0.8)
        rate_axes.plot(rates[name].mean(0), color=line.get_color(), label=name)
    loss_axes.set(
        xlabel="inner step", ylabel="training loss", yscale="log", title="Loss on held-out runs"
    )
    rate_axes.set(
        xlabel="inner step",
        ylabel="learning rate",
        title="Learning rate (thin: single runs)",
        ylim=(0, None),
    )
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Config))
