"""The trials of a search as text, as a picture and for TensorBoard."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaopt.black_box.space import Choice, Space
from metaopt.black_box.trial import Trial
from metaopt.extras import extra
from metaopt.log_axis import label_plainly
from metaopt.table import write_table


def write_trials(space: Space, objective: str, trials: Sequence[Trial], rows: int) -> str:
    """Return a table of the best trials, and a line for each that has none to show."""
    ranked = sorted(
        (trial for trial in trials if trial.status == "done"), key=lambda t: (t.loss, t.number)
    )
    cells = [
        [
            str(trial.number),
            *(_write(trial.values[name]) if name in trial.values else "" for name in space),
            f"{trial.loss:.6g}",
            "" if trial.seconds is None else f"{trial.seconds:.1f}",
        ]
        for trial in ranked[:rows]
    ]
    headers = ["trial", *space, objective, "seconds"]
    lines = [write_table(headers, cells, [""] * len(headers))]
    if len(ranked) > rows:
        lines.append(f"and {len(ranked) - rows} more that are done")
    lines += [
        f"trial {trial.number}: {trial.status}{f', {trial.error}' if trial.error else ''}"
        for trial in trials
        if trial.status != "done"
    ]
    return "\n".join(lines)


def draw(
    path: str | Path,
    name: str,
    space: Space,
    objective: str,
    trials: Sequence[Trial],
    importance: Mapping[str, float],
) -> None:
    """Draw the best loss so far, the loss over each parameter, and the importances if known."""
    with extra("`BlackBox.plot`"):
        from matplotlib.figure import Figure

    done = [trial for trial in trials if trial.status == "done"]
    panels = 1 + len(space) + bool(importance)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure = Figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    _draw_best(next(axes), objective, done)
    for parameter in space:
        _draw_slice(next(axes), parameter, space, objective, done)
    if importance:
        axis = next(axes)
        axis.barh(list(importance), list(importance.values()))
        axis.set(xlabel="importance", xlim=(0, 1))
    for axis in axes:
        axis.axis("off")
    figure.suptitle(f"{name}: {len(done)} of {len(trials)} trials done")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def write_hparams(directory: str | Path, objective: str, trials: Sequence[Trial]) -> None:
    """Write a run for each trial that is done, with its values and its loss."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(directory)) as writer:
        for trial in trials:
            if trial.status == "done" and trial.loss is not None:
                metrics = {f"metrics/{name}": value for name, value in trial.metrics.items()}
                writer.add_hparams(
                    dict(trial.values),
                    {f"metrics/{objective}": trial.loss, **metrics},
                    run_name=f"trial-{trial.number}",
                )


def _draw_best(axis: Any, objective: str, done: Sequence[Trial]) -> None:
    numbers = [trial.number for trial in done]
    losses = [trial.loss for trial in done if trial.loss is not None]
    axis.scatter(numbers, losses, s=12, color="C7", label="trial")
    axis.plot(
        numbers, list(itertools.accumulate(losses, min)), drawstyle="steps-post", label="best"
    )
    axis.set(xlabel="trial", ylabel=objective)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.legend()
    axis.grid(alpha=0.3)


def _draw_slice(axis: Any, name: str, space: Space, objective: str, done: Sequence[Trial]) -> None:
    """Draw the loss over one parameter; later trials are darker."""
    parameter = space[name]
    active = [trial for trial in done if name in trial.values]
    values: list[Any] = [trial.values[name] for trial in active]
    if isinstance(parameter, Choice):
        values = [str(value) for value in values]
    elif parameter.log:
        axis.set_xscale("log")
    numbers = [trial.number for trial in active]
    axis.scatter(
        values, [trial.loss for trial in active], s=14, c=numbers, cmap="Blues", edgecolors="C0"
    )
    if not isinstance(parameter, Choice) and parameter.log:
        label_plainly(axis.xaxis)
    axis.set(xlabel=name, ylabel=objective)
    axis.grid(alpha=0.3)


def _write(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
