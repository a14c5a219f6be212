"""The table, the figures and the plot of `language_model.py`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

COLOURS = ("#7a7a7a", "#c8442c", "#1f5fa8", "#2c8f6b")
Curves = dict[str, dict[str, Tensor]]  # sort -> way -> bits [seeds, documents, chunks]


class Report(NamedTuple):
    """What is printed, and what goes into the file of figures."""

    text: str
    figures: dict[str, Any]


def mean_and_margin(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean over documents, the first axis, and half the width of its 95 % interval."""
    spread = bits.std(0, correction=min(1, len(bits) - 1))
    return bits.mean(0), 1.96 * spread / math.sqrt(len(bits))


def write_report(curves: Curves, runs: list[dict[str, Any]], chunk: int) -> Report:
    """Return a table for each sort of documents, and all the figures.

    Intervals are over documents, of means over seeds; differences are those of the same documents.
    """
    lines: list[str] = []
    figures: dict[str, Any] = {"runs": runs, "sorts": {}}
    for sort, by_way in curves.items():
        others = list(by_way)[:2]
        figures["sorts"][sort] = by_name = {name: measure(by_way, name) for name in by_way}
        rows = [
            [
                name,
                f"{found['mean']:.3f} ± {found['margin']:.3f}",
                *found["quarters"],
                *(
                    "{:+.3f} ± {:.3f}".format(*found["minus"].get(other, (0, 0)))
                    for other in others
                ),
                " ".join(f"{mean:.3f}" for mean in found["by seed"]),
            ]
            for name, found in by_name.items()
        ]
        headers = ["bits per character", "mean", "first quarter", "last quarter"]
        headers += [*(f"minus {other}" for other in others), "each seed"]
        _, documents, chunks = by_way[others[0]].shape
        title = f"{documents} {sort}, {chunks * chunk} characters of each, 95 % intervals"
        table = tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3f")
        lines += ["", title, table]
    seconds = {
        name: sum(run["seconds"][name] for run in runs) / len(runs) for name in runs[0]["seconds"]
    }
    figures["seconds"] = seconds
    shown = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    return Report("\n".join([*lines, "", f"CPU seconds for a seed: {shown}"]), figures)


def measure(by_way: dict[str, Tensor], name: str) -> dict[str, Any]:
    """Return the figures of one way, and its differences from the others."""
    bits = by_way[name]
    documents = bits.mean(0)
    quarter = max(1, documents.shape[1] // 4)
    mean, margin = mean_and_margin(documents.mean(1))
    curve, band = mean_and_margin(documents)
    gaps = {
        other: mean_and_margin((documents - its.mean(0)).mean(1))
        for other, its in by_way.items()
        if other != name
    }
    return {
        "mean": mean.tolist(),
        "margin": margin.tolist(),
        "quarters": [
            documents[:, :quarter].mean().tolist(),
            documents[:, -quarter:].mean().tolist(),
        ],
        "by seed": bits.mean((1, 2)).tolist(),
        "by document": documents.mean(1).tolist(),
        "by position": curve.tolist(),
        "margin by position": band.tolist(),
        "minus": {other: [value.tolist() for value in gap] for other, gap in gaps.items()},
    }


def plot(curves: Curves, chunk: int, path: Path) -> None:
    """Draw the loss against the position in the document, and its difference from the first way's.

    Bands are 95 % intervals over documents.
    """
    figure = Figure(figsize=(6.4 * len(curves), 8), layout="constrained")
    panels = figure.subplots(2, len(curves), squeeze=False, sharex=True)
    for (above, below), (sort, by_way) in zip(panels.T, curves.items(), strict=True):
        first, its = next(iter(by_way.items()))
        for (name, bits), colour in zip(by_way.items(), COLOURS, strict=True):
            places = (torch.arange(bits.shape[2]) + 0.5) * chunk
            label = f"{name} ({bits.mean():.3f})"
            for axes, values in ((above, bits), (below, bits - its)):
                mean, margin = mean_and_margin(values.mean(0))
                axes.plot(places, mean, color=colour, label=label)
                band = {"color": colour, "alpha": 0.15, "linewidth": 0}
                axes.fill_between(places, mean - margin, mean + margin, **band)
        title = f"{its.shape[1]} {sort} that training never saw"
        above.set(ylabel="bits per character", title=title)
        above.legend(fontsize=8)
        below.set(xlabel="position in the document [characters]", ylabel=f"difference from {first}")
        for axes in (above, below):
            axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
