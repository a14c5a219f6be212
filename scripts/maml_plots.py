"""The plots of `maml.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from torch import Tensor

from metaopt.tasks.episode import Episode

BLUE, RED, GREEN, GREY = "#1f5fa8", "#c8442c", "#2c8f6b", "#7a7a7a"


def mean_and_margin(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over tasks, the first axis, and half the width of its 95 % interval."""
    return scores.mean(0), 1.96 * scores.std(0) / math.sqrt(len(scores))


def plot_sinusoid(
    path: Path,
    scores: dict[str, Tensor],
    steps: Sequence[int],
    adapted: dict[str, list[tuple[Episode, dict[str, Tensor]]]],
) -> None:
    """Draw how networks adapt to test waves, and the error over the number of steps.

    Args:
        path: where the picture goes.
        scores: squared errors [tasks, steps] by method.
        steps: numbers of gradient steps.
        adapted: for two networks, two waves each with the predictions at the query points by label.
    """
    layout = [[*(f"{name} {row}" for name in adapted), "error"] for row in range(2)]
    figure, axes = plt.subplot_mosaic(
        layout, figsize=(13, 6.4), width_ratios=[1, 1, 1.15], layout="constrained"
    )
    for (name, waves), color in zip(adapted.items(), (BLUE, RED), strict=True):
        for row, (task, predictions) in enumerate(waves):
            panel, order = axes[f"{name} {row}"], task.query[0].flatten().argsort()
            panel.plot(
                task.query[0][order], task.query[1][order], color="black", lw=1, label="the wave"
            )
            panel.plot(*task.support, "^", color="black", ms=6, label="points to adapt on")
            for style, (label, values) in zip((":", "--", "-"), predictions.items(), strict=True):
                panel.plot(
                    task.query[0][order], values[order], style, lw=1.7, color=color, label=label
                )
            panel.set(xlim=(-5, 5), ylim=(-5.6, 5.6), xlabel="x", ylabel="y", title=name)
            panel.grid(alpha=0.25)
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    _plot_curves(axes["error"], scores, steps)
    # with far more steps than in training, a wave may diverge and hide all else
    highest = 1.2 * min(score.mean(0).max().item() for score in scores.values())
    count = len(next(iter(scores.values())))
    axes["error"].set(
        ylim=(0, highest),
        ylabel="mean squared error",
        title=f"Error on {count} new waves (95 % intervals)",
    )
    axes["error"].legend()
    figure.suptitle(
        "Two initialisations adapting to new sine waves, and their error over the number of "
        "gradient steps"
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_omniglot(
    path: Path,
    scores: dict[str, Tensor],
    steps: Sequence[int],
    task: Episode,
    right: Tensor,
    losses: list[float],
    title: str,
) -> None:
    """Draw a test task with the answers, the accuracy over the steps, and the training curve.

    Args:
        path: where the picture goes.
        scores: accuracies [tasks, steps] by method; a single column is drawn as a level.
        steps: numbers of gradient steps.
        task: a test task.
        right: whether the answer to each query is right.
        losses: query losses in training.
        title: title of the picture.
    """
    figure, axes = plt.subplot_mosaic(
        [["task", "accuracy", "training"]], figsize=(15, 4.8), layout="constrained"
    )
    _plot_task(axes["task"], task, right)
    _plot_curves(axes["accuracy"], scores, steps)
    axes["accuracy"].axhline(
        1 / len(task.support[1].unique()), color="black", ls=":", lw=1, label="chance"
    )
    count = len(next(iter(scores.values())))
    axes["accuracy"].set(
        ylabel="accuracy", ylim=(0, 1), title=f"Accuracy on {count} new tasks (95 % intervals)"
    )
    axes["accuracy"].legend(loc="lower right", fontsize=9)
    width = min(100, max(1, len(losses) // 5))
    smooth = torch.tensor(losses).unfold(0, width, 1).mean(-1)
    axes["training"].plot(
        range(1, len(losses) + 1), losses, color=BLUE, alpha=0.2, lw=0.6, label="one meta-batch"
    )
    axes["training"].plot(
        range(width, len(losses) + 1), smooth, color=BLUE, label=f"mean of the last {width}"
    )
    axes["training"].set(
        xlabel="meta-gradients",
        ylabel="query loss after adaptation [nats]",
        title="Training tasks",
        ylim=(0, None),
    )
    axes["training"].legend()
    axes["training"].grid(alpha=0.25)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_task(axes: plt.Axes, task: Episode, right: Tensor) -> None:
    """Draw the first drawing of each class of the support set beside queries.

    The queries have the colour of the answer.
    """
    (images, labels), (queries, _) = task
    ways = min(len(labels.unique()), 10)
    for row in range(ways):
        mine = task.query[1] == row
        line = [(images[labels == row][0], "black")]
        line += [
            (image, BLUE if good else RED)
            for image, good in zip(queries[mine][:6], right[mine][:6], strict=True)
        ]
        for column, (image, color) in enumerate(line):
            picture = 1 - image[0, :, :, None] * (1 - torch.tensor(matplotlib.colors.to_rgb(color)))
            left = column + (0.35 if column else 0)
            axes.imshow(
                picture.numpy(),
                extent=(left, left + 0.94, row + 0.94, row),
                interpolation="nearest",
            )
    axes.axvline(1.14, color=GREY, lw=1)
    axes.set(
        xlim=(0, 7.35),
        ylim=(ways, 0),
        xticks=[0.47, 4.3],
        xticklabels=["given", "to classify: blue right, red wrong"],
        yticks=[],
    )
    axes.set_title(f"A new task: {int(right.sum())} of {len(right)} right")


def _plot_curves(axes: plt.Axes, scores: dict[str, Tensor], steps: Sequence[int]) -> None:
    """Draw the scores over the number of gradient steps, with 95 % intervals."""
    for (name, score), color in zip(scores.items(), (BLUE, RED, GREEN), strict=False):
        mean, margin = mean_and_margin(score)
        if len(mean) == 1:
            axes.axhspan(
                (mean - margin).item(), (mean + margin).item(), color=color, alpha=0.25, lw=0
            )
            axes.axhline(mean.item(), color=color, ls="--", lw=1.2, label=name)
        else:
            axes.fill_between(steps, mean - margin, mean + margin, color=color, alpha=0.25, lw=0)
            axes.plot(steps, mean, "o-", color=color, ms=4, label=name)
    axes.set_xlabel("gradient steps on the support set")
    axes.grid(alpha=0.25)
