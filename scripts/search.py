"""Search without gradients: ways to choose hyperparameters, compared on the same problem.

    python scripts/search.py branin
    python scripts/search.py meta-weight-net --backends random optuna botorch ax --trials 20

Branin's function has two real numbers and the minimum .398 at three points. The other problem is a
search on top of a graph of levels: the digits with wrong labels, which a learner minimises with
weights that a second level learns (see scripts/meta_weight_net.py). The search is over the
learner's rate (on a logarithmic scale), width and activation, and over the number of its steps for
each step of the weights; the total number of steps is fixed. The loss is that on clean examples
that no level has seen, averaged over the last quarter of the training.

Each search is written down in the output folder: a script that was interrupted, or that is run
again with more trials, goes on from there.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metaopt as mo
from metaopt.extras import extra
from metaopt.log_axis import label_plainly
from metaopt.table import write_table
from metaopt.tasks.corruption import flip_labels, stratified_split
from metaopt.tasks.digits import CLASSES, PIXELS, digits
from optimizers import SGD, Adam

with extra("scripts/search.py"):
    import command_line
    import tyro
    from matplotlib.figure import Figure

Backend = Literal["random", "sobol", "optuna", "botorch", "ax"]
BACKENDS = {
    "random": mo.RandomSearch,
    "sobol": mo.Sobol,
    "optuna": mo.Optuna,
    "botorch": mo.BoTorch,
    "ax": mo.Ax,
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
# digits of each class that are clean, for the weights; clean, for validation; damaged, to learn on
CLEAN, VALIDATION, TRAIN = 10, 20, 100
BATCH, MOST_INNER_STEPS = 100, 20


@dataclass(frozen=True)
class Config:
    """Compare ways to search."""

    problem: tyro.conf.Positional[Literal["branin", "meta-weight-net"]] = "branin"
    """Problem to minimise."""
    backends: tuple[Backend, ...] = ("random", "optuna", "botorch", "ax")
    """Backends that suggest values."""
    trials: int = 20
    """Number of trials of each search."""
    seeds: int = 5
    """Number of searches by each; of meta-weight-net also of splits and initialisations."""
    seed: int = 0
    """The first of them."""
    steps: int = 300
    """Steps of the learner in a trial of meta-weight-net."""
    noise: float = 0.4
    """Share of wrong labels, in [0, 1)."""
    out: Path = Path("runs/search")
    """Folder for the trials, the figures and the plots."""

    def __post_init__(self) -> None:
        for name in ("trials", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")
        if self.steps < MOST_INNER_STEPS:
            raise ValueError(f"`steps` must be at least {MOST_INNER_STEPS}, got {self.steps}.")
        if not 0 <= self.noise < 1:
            raise ValueError(f"`noise` must lie in [0, 1), got {self.noise}.")


Problem = tuple[Mapping[str, Any], Callable[[dict[str, Any]], Any]]  # space, objective


def branin(values: dict[str, Any]) -> float:
    """Return Branin's function."""
    x, y = values["x"], values["y"]
    parabola = y - 5.1 / (4 * math.pi**2) * x**2 + 5 / math.pi * x - 6
    return parabola**2 + 10 * (1 - 1 / (8 * math.pi)) * math.cos(x) + 10


def learner_loss(levels: Any, batch: Any) -> Tensor:
    """Return the weighted mean of the losses."""
    losses = F.cross_entropy(levels.learner(batch[0]), batch[1], reduction="none")
    weights = levels.weights(losses.detach()[:, None]).squeeze(-1)
    return (weights * losses).sum() / weights.sum()


def meta_loss(levels: Any, batch: Any) -> Tensor:
    """Return the mean loss of clean examples."""
    return F.cross_entropy(levels.learner(batch[0]), batch[1])


def validation_loss(values: dict[str, Any], *, seed: int, steps: int, noise: float) -> Any:
    """Return how well a learner with these values, trained with learned weights, does."""
    torch.set_num_threads(1)
    (images, truth), generator = digits(), torch.Generator().manual_seed(seed)
    parts = stratified_split(truth, (CLEAN, VALIDATION, TRAIN), generator)
    clean, validation, train = parts[:3]
    labels = flip_labels(truth[train], noise, CLASSES, generator)
    drawn = torch.randint(len(train), (steps, BATCH), generator=generator)
    torch.manual_seed(seed)
    width, activation = values["width"], ACTIVATIONS[values["activation"]]
    model = nn.Sequential(nn.Linear(PIXELS, width), activation(), nn.Linear(width, CLASSES))
    net = nn.Sequential(nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    learner = mo.Level(
        "learner",
        model,
        learner_loss,
        SGD(values["rate"], momentum=0.9),
        data=[(images[train][index], labels[index]) for index in drawn],
    )
    weights = mo.Level("weights", net, meta_loss, Adam(1e-3), data=[(images[clean], truth[clean])])
    graph = mo.LevelGraph([mo.Edge(weights, learner, steps=values["inner_steps"])])
    losses, rights = [], []
    rounds = steps // values["inner_steps"]
    for step in range(1, rounds + 1):
        graph.step()
        if 4 * step > 3 * rounds:  # the mean over the last quarter: single losses jump
            with torch.no_grad():
                logits = model(images[validation])
            losses.append(F.cross_entropy(logits, truth[validation]))
            rights.append((logits.argmax(-1) == truth[validation]).float().mean())
    return {"loss": torch.stack(losses).mean(), "accuracy": torch.stack(rights).mean()}


def make_problem(config: Config, seed: int) -> Problem:
    """Return the space and the function."""
    if config.problem == "branin":
        return {"x": mo.Float(-5.0, 10.0), "y": mo.Float(0.0, 15.0)}, branin
    space = {
        "rate": mo.Float(1e-4, 10.0, log=True),
        "width": mo.Int(4, 256, log=True),
        "inner_steps": mo.Int(1, MOST_INNER_STEPS),
        "activation": mo.Choice(*ACTIVATIONS),
    }
    function = partial(validation_loss, seed=seed, steps=config.steps, noise=config.noise)
    return space, function


def run(config: Config, backend: Backend, seed: int) -> mo.BlackBox:
    """Run one search, or what is left of it."""
    space, function = make_problem(config, seed)
    path = config.out / config.problem / f"{backend}-{seed}.jsonl"
    name = f"{config.problem}, {backend}, seed {seed}"
    search = mo.BlackBox(name, space, backend=BACKENDS[backend](seed=seed), journal=path)
    search.run(function, config.trials)
    return search


def best_so_far(search: mo.BlackBox, trials: int) -> list[float]:
    """Return the least loss after each trial."""
    losses = [math.inf if t.loss is None else t.loss for t in search.trials[:trials]]
    return list(accumulate(losses, min))


def draw(config: Config, curves: Mapping[str, list[list[float]]], path: Path) -> None:
    """Draw the best loss so far of each way: the median of the seeds, and their range."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    numbers = range(1, config.trials + 1)
    top = 0.0
    for name, rows in curves.items():
        columns = [sorted(column) for column in zip(*rows, strict=True)]
        medians = [statistics.median(column) for column in columns]
        top = max([top, *filter(math.isfinite, medians)])
        (line,) = axis.plot(numbers, medians, label=name)
        low, high = [c[0] for c in columns], [c[-1] for c in columns]
        axis.fill_between(numbers, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
    # the first trials of some seeds blow up
    axis.set(xlabel="trial", ylabel="least loss so far", yscale="log", ylim=(None, 1.5 * top))
    label_plainly(axis.yaxis)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(f"{config.problem}: median of {config.seeds} seeds, and their range")
    axis.grid(alpha=0.3, which="both")
    axis.legend()
    figure.savefig(path, dpi=130)


def report(config: Config, curves: Mapping[str, list[list[float]]]) -> str:
    """Return a table of the best losses, and of their paired differences from random search's."""
    last = {name: [row[-1] for row in rows] for name, rows in curves.items()}
    rows = []
    for name, losses in last.items():
        row = [name, statistics.median(losses), statistics.fmean(losses), "", ""]
        if name != "random" and "random" in last:
            pairs = list(zip(losses, last["random"], strict=True))
            row[3] = difference([a - b for a, b in pairs if math.isfinite(a) and math.isfinite(b)])
            row[4] = f"{sum(a < b for a, b in pairs)} of {len(pairs)}"
        rows.append([*row, " ".join(f"{loss:.3f}" for loss in losses)])
    headers = ["", "median", "mean", "minus random", "better in", "each seed"]
    return f"Least loss after {config.trials} trials\n" + write_table(
        headers, rows, ["", ".3f", ".3f", "", "", ""]
    )


def difference(gaps: list[float]) -> str:
    """Return the mean, with its standard error if there is one."""
    if not gaps:
        return ""
    error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.3f}" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.3f}{error}"


def main(config: Config) -> dict[str, list[float]]:
    """Run all searches, print the table, and write figures and plots."""
    torch.set_num_threads(1)
    folder = config.out / config.problem
    curves: dict[str, list[list[float]]] = {}
    for backend in config.backends:
        curves[backend] = []
        for seed in range(config.seed, config.seed + config.seeds):
            search = run(config, backend, seed)
            curves[backend].append(best_so_far(search, config.trials))
        search.plot(folder / f"{backend}.png")
        search.write_tensorboard(folder / "tensorboard" / backend)
    draw(config, curves, folder / "best.png")
    (folder / "best.json").write_text(json.dumps(curves, indent=1))
    print(f"\n{report(config, curves)}\nPlots and trials: {folder}")
    return {name: [row[-1] for row in rows] for name, rows in curves.items()}


if __name__ == "__main__":
    command_line.run(main, Config, __doc__, shares=False)
