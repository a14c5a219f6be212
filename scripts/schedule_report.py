"""What `train_schedule.py` compares and draws."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

import metaopt as mo
from metaopt.extras import extra
from metaopt.log_axis import label_plainly
from metaopt.meta_training.evaluation import TEST_SEED, VALIDATION_SEED
from metaopt.meta_training.task import sample_tasks

with extra("scripts/train_schedule.py"):
    from matplotlib.figure import Figure
    from tabulate import tabulate

Objective = Callable[[Tensor], Tensor]  # losses [..., steps] -> [...]


def mean(losses: Tensor) -> Tensor:
    """Return the mean loss of each run."""
    return losses.mean(-1)


def final(losses: Tensor) -> Tensor:
    """Return the mean loss of each run over its last tenth."""
    return losses[..., -tail(losses.shape[-1]) :].mean(-1)


def tail(horizon: int) -> int:
    """Return the number of steps in the last tenth."""
    return max(1, horizon // 10)


def choose(
    candidates: Mapping[str, mo.Optimizer],
    family: mo.TaskFamily,
    horizon: int,
    objective: Objective,
    seeds: int = 64,
) -> str:
    """Return the name of the candidate that is best on validation tasks."""
    report = mo.evaluate(candidates, family, horizon=horizon, seeds=seeds, seed=VALIDATION_SEED)
    scores = {name: float(objective(curves).mean()) for name, curves in report.curves.items()}
    finite = {name: score for name, score in scores.items() if math.isfinite(score)}
    if not finite:
        raise ValueError(f"Every candidate diverged: {list(candidates)}. Try smaller rates.")
    return min(finite, key=finite.__getitem__)


def compare(report: mo.Report, reference: str) -> list[dict[str, Any]]:
    """Return a row per optimizer: losses, and their paired differences from `reference`.

    z is the mean of the differences over their standard error, over runs on the same tasks.
    """
    rows = []
    for name, curves in report.curves.items():
        row: dict[str, Any] = {"name": name}
        for what, objective in (("mean", mean), ("final", final)):
            own, other = objective(curves), objective(report.curves[reference])
            difference = own - other
            error = difference.std() / len(difference) ** 0.5
            row[what] = float(own.mean())
            row[f"{what} ratio"] = float(own.mean() / other.mean())
            row[f"{what} z"] = float(difference.mean() / error) if error > 0 else 0.0
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as text."""
    return tabulate([list(row.values()) for row in rows], headers=list(rows[0]), floatfmt=".4f")


def write_json(path: Path, key: str, options: dict[str, Any], entry: dict[str, Any]) -> None:
    """Put an entry into a JSON file beside what is there, with the options but for paths."""
    entries = json.loads(path.read_text()) if path.is_file() else {}
    shown = {name: one for name, one in options.items() if not isinstance(one, Path)}
    entries[key] = {"options": shown, **entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(sorted(entries.items())), indent=1, ensure_ascii=False)
    path.write_text(text + "\n")


def observed_rates(
    optimizer: mo.Optimizer, family: mo.TaskFamily, horizon: int, seeds: int = 16
) -> Tensor:
    """Return the learning rate used at each step of `seeds` test runs, [seeds, horizon]."""

    def run(params: mo.tree.Tree, batches: mo.tree.Tree) -> Tensor:
        state, rates = optimizer.init(params), []
        for t in range(horizon):
            grads, loss = torch.func.grad_and_value(family.loss)(params, mo.tree.index(batches, t))
            rates.append(torch.as_tensor(optimizer.values(state, loss=loss, grads=grads)["lr"]))
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
    label_plainly(loss_axes.yaxis)
    for axes in (loss_axes, rate_axes):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
