"""The picture that `meta_weight_net.py` draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot(
    config: Any,
    title: str,
    found: Sequence[tuple[Tensor, Tensor, Tensor]],
    results: Mapping[str, Any],
    path: Path,
) -> None:
    """Draw test accuracy over training at every learning rate, and the weight over the loss.

    Args:
        config: of the script.
        title: what was learned from.
        found: (losses, weights, group) of the training set, for every seed.
        results: by method.
        path: of the file.
    """
    figure = plt.figure(figsize=(14, 8), layout="constrained")
    figure.suptitle(f"{title}: test accuracy over training, and what the weight net learned")
    above, below = figure.subfigures(2, 1, squeeze=False)[:, 0]
    axes = above.subplots(1, len(config.learning_rates), sharey=True, squeeze=False)[0]
    for i, (axis, rate) in enumerate(zip(axes, config.learning_rates)):
        for colour, (method, result) in enumerate(results.items()):
            accuracy = 100 * result.test_accuracy[:, i]
            mean, error = accuracy.mean(0), accuracy.std(0) / config.seeds**0.5
            axis.plot(
                config.lengths, mean, marker="o", markersize=3, color=f"C{colour}", label=method
            )
            axis.fill_between(
                config.lengths,
                mean - error,
                mean + error,
                color=f"C{colour}",
                alpha=0.2,
                linewidth=0,
            )
        axis.set(xlabel="steps", title=f"learning rate {rate:g}", ylim=(40, 100))
        axis.set_xscale("log", base=2)
        axis.set_xticks(config.lengths, labels=[str(length) for length in config.lengths])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%), mean ± standard error")
    axes[0].legend(loc="lower right")

    losses, weights, group = (torch.cat(parts) for parts in zip(*found))
    names = (
        ("right labels", "wrong labels")
        if config.noise
        else ("five largest classes", "five rarest classes")
    )
    scatter, histogram = below.subplots(1, 2)
    bins = torch.linspace(0, weights.max(), 41).tolist()
    for name, shade, chosen in zip(names, ("C0", "C3"), (~group, group)):
        scatter.scatter(
            losses[chosen], weights[chosen], s=6, color=shade, alpha=0.5, linewidths=0, label=name
        )
        histogram.hist(weights[chosen], bins=bins, density=True, color=shade, alpha=0.5, label=name)
    relative = "learned weight / mean weight"
    scatter.set(
        xlabel="loss of the training example (nats)",
        ylabel=relative,
        title="Learned weight over the loss",
    )
    scatter.set(xscale="log", xlim=(1e-4, None))
    histogram.set(xlabel=relative, ylabel="density", title="Distribution of the learned weight")
    for axis in (scatter, histogram):
        axis.legend(
            title=f"{config.seeds} seeds, tuned rate, {config.lengths[-1]} steps", markerscale=3
        )
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
