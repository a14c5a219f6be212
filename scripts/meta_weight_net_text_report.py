"""The tables and pictures of `meta_weight_net.py text`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tabulate
import torch
from matplotlib.figure import Figure
from meta_weight_net import Result, percent
from torch import Tensor

from metaopt.tasks.rated_text import Corpus

LOWEST = 10
LABELS = ("negative", "positive")


class Seen(NamedTuple):
    """A training set at the end of a training with a weight net."""

    losses: Tensor
    weights: Tensor  # over their mean
    wrong: Tensor  # whether the label is
    given: Tensor  # labels
    rows: Tensor  # in the corpus


def report(config: Any, results: Mapping[str, Result], seconds: Mapping[str, float]) -> str:
    """Return the tables: each method tuned and long, and all of them at every rate."""
    learned = [name for name in ("finite differences", "SAMA") if name in results]
    rows, fixed = [], []
    for method, result in results.items():
        row = [method]
        for longest in (False, True):
            accuracy = result.chosen(longest=longest)
            gaps = [results[name].chosen(longest=longest) - accuracy for name in learned]
            row.append(percent(accuracy))
            row += [percent(gap, signed=True) if gap.any() else "" for gap in gaps]
        rows.append([*row, f"{1000 * seconds[method]:.1f}"])
        fixed += [
            [method, f"{rate:g}", *map(percent, result.test_accuracy[:, place].T)]
            for place, rate in enumerate(config.learning_rates)
        ]
    minus = [f"{name} - it" for name in learned]
    steps = f"{config.lengths[-1]} steps"
    heads = ["method", "tuned rate and length", *minus, f"tuned rate, {steps}", *minus, "ms a step"]
    lengths = [f"{length} steps" for length in config.lengths]
    tables = (
        tabulate.tabulate(rows, heads, disable_numparse=True),
        tabulate.tabulate(fixed, ["method", "rate", *lengths], disable_numparse=True),
    )
    return (
        f"{title(config)}; test accuracy in %, mean ± standard error over {config.seeds} seeds\n"
        f"{tables[0]}\nDifferences are paired by seed; * means more than two standard errors. "
        f"Times are CPU times.\n\n{tables[1]}"
    )


def title(config: Any) -> str:
    """Describe the damage in words."""
    whose = "labels" if config.flip == "both" else f"labels of {config.flip} ones"
    noise = f"{100 * config.noise:g} % of the {whose} flipped" if config.noise else ""
    tail = f"classes 1:{config.imbalance:g}" if config.imbalance > 1 else ""
    return "Film reviews, " + (" and ".join(filter(None, (noise, tail))) or "undamaged")


def lowest(method: str, seen: Seen, corpus: Corpus) -> str:
    """Return a table of the snippets with the lowest weights."""
    rows = []
    for place in seen.weights.argsort()[:LOWEST].tolist():
        row = int(seen.rows[place])
        rows.append(
            [
                f"{seen.weights[place]:.3f}",
                f"{seen.losses[place]:.2f}",
                LABELS[int(seen.given[place])] + (" (wrong)" if seen.wrong[place] else ""),
                f"{corpus.ratings[row]:+.2f}",
                corpus.texts[row],
            ]
        )
    share = ""
    if seen.wrong.any():
        times = seen.weights[seen.wrong].mean() / seen.weights[~seen.wrong].mean()
        share = f" (wrong labels weigh {times:.2f} times what right ones weigh)"
    table = tabulate.tabulate(
        rows,
        ["weight", "loss", "label", "rating", "snippet"],
        disable_numparse=True,
        maxcolwidths=[None, None, None, None, 70],
    )
    return f"{method}, lowest weights of the first seed{share}:\n{table}"


def draw(title: str, seen: Mapping[str, Sequence[Seen]], path: Path) -> None:
    """Draw the weight of every training example over its loss, and how weights are distributed.

    There is a row for each method.
    """
    figure = Figure(figsize=(13, 4 * len(seen)), layout="constrained")
    figure.suptitle(title)
    rows = figure.subplots(len(seen), 2, squeeze=False, sharex="col")
    for (method, sets), (scatter, histogram) in zip(seen.items(), rows, strict=True):
        losses, weights, wrong, given = (
            torch.cat([getattr(one, name) for one in sets])
            for name in ("losses", "weights", "wrong", "given")
        )
        bins = torch.linspace(0, float(weights.max()), 41).tolist()
        for label, name in enumerate(LABELS):
            for is_wrong, kind, shade in ((False, "right", 0), (True, "wrong", 3)):
                chosen = (given == label) & (wrong == is_wrong)
                if not chosen.any():
                    continue
                style = {"color": f"C{shade + label}", "alpha": 0.4, "label": f"{kind}ly {name}"}
                scatter.scatter(losses[chosen], weights[chosen], s=5, linewidths=0, **style)
                histogram.hist(weights[chosen], bins=bins, density=True, **style)
        relative = "learned weight / mean weight"
        scatter.set(xlabel="loss of the training example (nats)", ylabel=relative, xscale="log")
        histogram.set(xlabel=relative, ylabel="density")
        scatter.legend(title=f"{method}, {len(sets)} seeds", markerscale=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
