"""Comparing optimizers on tasks that training never saw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.replay import Ambient
from metaopt.extras import extra
from metaopt.log_axis import label_plainly
from metaopt.meta_training.running import AnyOptimizer, run_tasks
from metaopt.meta_training.task import TaskFamily, sample_tasks
from metaopt.table import write_table

VALIDATION_SEED = 1_000_003
TEST_SEED = 2_000_003


@dataclass(frozen=True)
class Report:
    """Losses of several optimizers on the same tasks.

    Attributes:
        curves: name -> losses [seeds, horizon], the loss before each step.
    """

    curves: dict[str, Tensor]

    def mean(self, name: str) -> float:
        """Return the mean loss over seeds and steps: the area under the curve over the horizon."""
        return cast(float, self.curves[name].mean().tolist())

    def table(self) -> str:
        """Return a row per optimizer.

        It holds the mean loss, its standard error over seeds, the loss in the last tenth of the
        steps, and the number of runs that diverged.
        """
        rows: list[list[str | float]] = []
        for name, losses in self.curves.items():
            per_seed = losses.mean(1)
            error = torch.tensor(torch.nan)
            if len(per_seed) > 1:
                error = per_seed.std() / len(per_seed) ** 0.5
            last = losses[:, -max(1, losses.shape[1] // 10) :].mean()
            diverged = (~losses.isfinite().all(1)).sum()
            numbers: Any = [x.tolist() for x in (per_seed.mean(), error, last, diverged)]
            rows.append([name, *numbers])
        headers = ["optimizer", "mean loss", "std. error", "final loss", "diverged"]
        return write_table(headers, rows, ["", ".4f", ".4f", ".4f", ""])

    def plot(self, path: str | Path, title: str = "") -> None:
        """Draw the mean loss against the step, with a band of two standard errors, into a file."""
        with extra("`Report.plot`"):
            from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, losses in self.curves.items():
            mean = losses.mean(0)
            error = losses.std(0, correction=len(losses) > 1) / len(losses) ** 0.5
            steps = torch.arange(len(mean))
            (line,) = axes.plot(steps, mean, label=f"{name} (mean {self.mean(name):.3f})")
            band: Any = {"color": line.get_color(), "alpha": 0.2, "linewidth": 0}
            axes.fill_between(steps, mean - 2 * error, mean + 2 * error, **band)
        seeds = len(next(iter(self.curves.values())))
        label = f"training loss, mean of {seeds} runs"
        axes.set(xlabel="inner step", ylabel=label, yscale="log", title=title)
        label_plainly(axes.yaxis)
        axes.grid(alpha=0.3)
        axes.legend()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


def evaluate(
    optimizers: Mapping[str, AnyOptimizer],
    tasks: TaskFamily,
    *,
    horizon: int,
    seeds: int = 64,
    seed: int = TEST_SEED,
) -> Report:
    """Run every optimizer on the same `seeds` tasks for `horizon` steps.

    Args:
        optimizers: name -> optimizer; or a function from a list of parameters to a torch optimizer,
            of any library: `lambda params: torch.optim.AdamW(params, lr=1e-3)`. One that was
            made with `steps=None` is told the horizon.
        tasks: the family to draw from.
        horizon: number of steps.
        seeds: number of tasks.
        seed: where their randomness starts, that of losses with dropout included, which every
            optimizer meets alike; by default test tasks, apart from those that `tune` and training
            use. The global generators stay as they are.

    Raises:
        ValueError: there is nothing to compare, or a number is not positive.
    """
    if not optimizers or horizon < 1 or seeds < 1:
        raise ValueError(
            f"`evaluate` needs an optimizer, a horizon and seeds, got {list(optimizers)}, "
            f"{horizon} and {seeds}."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = sample_tasks(tasks, generator, seeds, horizon)
    noise = Ambient.after(generator, tree.leaves(tuple(drawn)))

    found = {name: run_tasks(one, tasks, drawn, noise) for name, one in optimizers.items()}
    return Report({name: losses for name, (losses, _) in found.items()})


def tune(
    make: Callable[[float], AnyOptimizer],
    grid: Iterable[float],
    tasks: TaskFamily,
    *,
    horizon: int,
    seeds: int = 32,
) -> tuple[float, float]:
    """Return (the value in `grid` with the lowest mean loss on validation tasks, that loss).

    Raises:
        ValueError: the grid is empty, or every value diverged.
    """
    values = [float(value) for value in grid]
    if not values:
        raise ValueError("`grid` must hold at least one value, got none.")
    candidates = {repr(value): make(value) for value in values}
    report = evaluate(candidates, tasks, horizon=horizon, seeds=seeds, seed=VALIDATION_SEED)
    means = {value: report.mean(repr(value)) for value in values}
    finite = [value for value in values if math.isfinite(means[value])]
    if not finite:
        raise ValueError(f"Every value of the grid diverged: {values}. Try smaller ones.")
    best = min(finite, key=means.__getitem__)
    return best, means[best]
