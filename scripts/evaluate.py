"""Compare learned optimizers with tuned hand-designed ones on tasks that training never saw.

    python scripts/evaluate.py --weights runs/optimizer/weights.safetensors --task digits
    python scripts/evaluate.py --trained small --task held-out
    python scripts/evaluate.py --trained lstm mlp schedule --task held-out --recorded --write

The last two commands judge over eight families of tasks: docs/pages/results/learned-optimizers.md.
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
from optimizers import SGD, Adam, RMSprop, load_trained

with extra("scripts/evaluate.py"):
    import command_line
    from judging import hand_designed, judge, learned, publish, recorded_figures
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
    trained: tuple[str, ...] = ()
    """Names of optimizers that come with the package."""
    task: Literal[
        "digits",
        "digits-deep",
        "quadratics",
        "quadratics-20",
        "quadratics-50",
        "held-out",
        "stress",
    ] = "digits"
    """Task of the comparison, which need not be that of their training. "held-out" is a table over
    eight families, and "stress" a table over longer runs and larger networks. In both, one factor
    of each optimizer is tuned over 14 values."""
    horizon: int | None = None
    """Inner steps; by default the task's own."""
    seeds: int | None = None
    """Test tasks; by default 64, and 12 for each family of a table."""
    tuning_seeds: int | None = None
    """Validation tasks on which learning rates are chosen; by default 32, and 8 for a table."""
    against: tuple[Literal["Adam", "Nesterov", "Muon"], ...] = ("Adam",)
    """Hand-designed optimizers of a table, each with a constant rate and with a cosine."""
    recorded: bool = False
    """Take the rates of hand-designed optimizers from the published table over held-out families,
    in place of tuning them again. The numbers of seeds must be those of that table."""
    resume: bool = False
    """Take families of the table from `out`, if an earlier run of these optimizers left them."""
    write: bool = False
    """Publish tables in docs/pages/results/learned-optimizers.md and docs/pages/get-started.md, and
    their figures in benchmarks/carrying-over.json."""
    families: tuple[str, ...] = ()
    """Names of some families of a table; by default all of them."""
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
    if config.task in ("held-out", "stress"):
        make_table(config)
    else:
        compare(config)


def load_learned(config: Config) -> dict[str, mo.Optimizer]:
    """Return the optimizers that are to be judged, by name."""
    shipped = {name: load_trained(name) for name in config.trained}
    given = {str(path): mo.Optimizer.load(path) for path in config.weights}
    return shipped | given


def make_table(config: Config) -> None:
    """Judge on several families, and write the tables, the figures and the curves."""
    everything = (
        mo.tasks.held_out_families() if config.task == "held-out" else mo.tasks.stress_families()
    )
    unknown = set(config.families) - everything.keys()
    if unknown:
        raise ValueError(f"There is no family {sorted(unknown)}; there are {[*everything]}.")
    baselines = hand_designed(config.against)
    judgement = judge(
        baselines | {name: learned(one) for name, one in load_learned(config).items()},
        {name: everything[name] for name in config.families or everything},
        config.against[0],
        config.seeds or 12,
        config.tuning_seeds or 8,
        config.out,
        recorded_figures([*baselines]) if config.recorded else {},
        config.resume,
    )
    tables = [judgement.table("mean"), judgement.table("final"), judgement.accuracies()]
    text = "\n\n".join([table for table in tables if table] + [judgement.summary()])
    print(text)
    (config.out / f"{config.task}.txt").write_text(text + "\n")
    judgement.plot(config.out / f"{config.task}.png")
    if config.write:
        publish(judgement)
    print(f"Figures: {config.out / 'judgement.json'}   Plot: {config.out / config.task}.png")


def compare(config: Config) -> None:
    """Compare on one task, in a table and a plot."""
    seeds, tuning_seeds = config.seeds or 64, config.tuning_seeds or 32
    family, horizon = TASKS[config.task]
    horizon = horizon if config.horizon is None else config.horizon
    optimizers: dict[str, mo.Optimizer] = {}
    found = load_learned(config)
    for path, one in found.items():
        name = f"learned: {type(one).__name__}"
        optimizers[name + (f" ({path})" if len(found) > 1 else "")] = one
    for name, make in tqdm(HAND_DESIGNED.items(), desc="tuning", mininterval=0.5):
        lr, _ = mo.tune(make, config.grid, family, horizon=horizon, seeds=tuning_seeds)
        optimizers[f"{name}, lr {lr:g}"] = make(lr)
    report = mo.evaluate(optimizers, family, horizon=horizon, seeds=seeds)

    title = f"{config.task}: {horizon} steps from {seeds} fresh initialisations"
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
    command_line.run(main, Config, shares=False, has_checkpoints=False)
