"""How `data_attribution.py` judges scores, and what it writes and draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.extras import extra

with extra("scripts/data_attribution.py"):
    from matplotlib.figure import Figure

DRAWS, LEVEL = 1000, 0.95  # of the bootstrap
SHOWN, COLUMNS = 4, 5  # test examples in the plot, and training examples on each side of them
HELPED, HURT = "tab:blue", "tab:red"

Scores = tuple[str, Tensor, float]  # setting, [tests, examples], CPU seconds


class Judged(NamedTuple):
    """A method's scores at its best setting.

    Attributes:
        scores: [tests, examples].
        figures: its linear datamodeling score, the ends of the interval, that of the difference
            from the exact metagradient, CPU seconds, and what else the table shows.
    """

    scores: Tensor
    figures: dict[str, Any]


def rank(values: Tensor) -> Tensor:
    """Return ranks along the last axis; equal values share the mean of theirs."""
    above = (values[..., :, None] > values[..., None, :]).double().sum(-1)
    equal = (values[..., :, None] == values[..., None, :]).double().sum(-1)
    return above + (equal - 1) / 2


def correlate(a: Tensor, b: Tensor) -> Tensor:
    """Return the correlation along the last axis, 0 where all values are equal."""
    a, b = (values - values.mean(-1, keepdim=True) for values in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return (a * b).sum(-1) / scale.clamp(min=torch.finfo(scale.dtype).tiny)


def datamodeling_scores(scores: Tensor, weights: Tensor, real: Tensor) -> Tensor:
    """Return the linear datamodeling score of each test example, [tests].

    It is the rank correlation of sum_i w_i score_i with the real loss over the subsets.

    Args:
        scores: d loss / d w_i, [tests, examples].
        weights: of the examples in each subset, [subsets, examples].
        real: losses after training on each subset, [tests, subsets].

    Reference:
        Park et al. 2023, arXiv:2303.14186, definition 2.3.
    """
    return correlate(rank(scores @ weights.T), rank(real))


def bootstrap(predicted: dict[str, Tensor], real: Tensor, seed: int) -> dict[str, Tensor]:
    """Return mean scores of resampled subsets and test examples, the same for all, [draws].

    Ranks stay those among all subsets: ranks among drawn ones, of which many are equal, would be
    biased towards 0.
    """
    generator = torch.Generator().manual_seed(seed)
    tests, subsets = real.shape
    ranks, wanted = {name: rank(values) for name, values in predicted.items()}, rank(real)
    found: dict[str, list[Tensor]] = {name: [] for name in predicted}
    for _ in range(DRAWS):
        rows = torch.randint(tests, (tests,), generator=generator)
        columns = torch.randint(subsets, (subsets,), generator=generator)
        for name, values in ranks.items():
            drawn = values[rows][:, columns], wanted[rows][:, columns]
            found[name].append(correlate(*drawn).mean())
    return {name: torch.stack(means) for name, means in found.items()}


def interval(draws: Tensor) -> list[float]:
    """Return the ends of the interval that holds the middle of the draws."""
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=draws.dtype)
    return draws.quantile(ends).tolist()  # type: ignore[no-any-return]


def judge(
    scores: dict[str, list[Scores]], weights: Tensor, real: Tensor, others: list[Tensor], seed: int
) -> dict[str, Judged]:
    """Return each method at the setting with the best score; the first method is the exact one.

    Args:
        scores: by method, at each setting.
        weights: of the examples in each subset, [subsets, examples].
        real: losses after training on each subset, [tests, subsets].
        others: the same of other seeds.
        seed: of the bootstrap.
    """
    best = {
        name: max(
            each, key=lambda one: datamodeling_scores(one[1], weights, real).mean().nan_to_num(-1)
        )
        for name, each in scores.items()
    }
    draws = bootstrap({name: one @ weights.T for name, (_, one, _) in best.items()}, real, seed)
    first = next(iter(draws.values()))
    judged = {}
    for name, (setting, found, seconds) in best.items():
        figures = {
            "score": datamodeling_scores(found, weights, real).mean().tolist(),
            "interval": interval(draws[name]),
            "below the exact": interval(first - draws[name]),
            "setting": setting,
            "seconds": seconds,
            "settings": {
                label: datamodeling_scores(one, weights, real).mean().tolist()
                for label, one, _ in scores[name]
            },
        }
        if others:
            means = [datamodeling_scores(found, weights, other).mean() for other in others]
            figures["other seeds"] = torch.stack(means).mean().tolist()
        judged[name] = Judged(found, figures)
    return judged


def write_table(judged: dict[str, Judged]) -> str:
    """Return the table as Markdown."""
    has_others = any("other seeds" in one.figures for one in judged.values())
    heads = [
        "scores by",
        "LDS",
        f"{100 * LEVEL:.0f} % interval",
        "below the exact by",
        "CPU s",
        "setting",
    ]
    heads += ["LDS, other seeds"] * has_others
    rows = [heads, ["---"] * len(heads)]
    for place, (name, one) in enumerate(judged.items()):
        figures = one.figures
        low, high = figures["interval"]
        less, more = figures["below the exact"]
        row = [name, f"{figures['score']:.3f}", f"{low:.3f} to {high:.3f}"]
        row += [f"{less:.3f} to {more:.3f}" if place else "", f"{figures['seconds']:.1f}"]
        row += [figures["setting"]]
        if has_others:
            row.append(f"{figures['other seeds']:.3f}")
        rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot_scores(judged: dict[str, Judged], path: Path) -> None:
    """Draw each method's score with its interval."""
    figure = Figure(figsize=(7, 0.4 * len(judged) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [*judged][::-1]
    means = torch.tensor([judged[name].figures["score"] for name in names])
    ends = torch.tensor([judged[name].figures["interval"] for name in names]).T
    low = ends.min().tolist()
    errors = torch.stack([means - ends[0], ends[1] - means]).clamp(min=0)
    colours = [HELPED if name == next(iter(judged)) else "tab:gray" for name in names]
    # lists: matplotlib's arithmetic with tensors warns of numpy's deprecations
    axes.barh(names, means.tolist(), xerr=errors.tolist(), color=colours, capsize=3)
    axes.set(
        xlabel=f"linear datamodeling score, {100 * LEVEL:.0f} % interval", xlim=(min(0, low), 1)
    )
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=130)


def plot_digits(
    examples: tuple[Tensor, Tensor], tests: tuple[Tensor, Tensor], scores: Tensor, path: Path
) -> None:
    """Draw test digits of different classes with large scores, and what helped and hurt most.

    A training digit helped if more weight on it would lower the loss of the test digit.
    """
    figure = Figure(figsize=(11, 1.3 * SHOWN + 0.4), layout="constrained")
    by_class: dict[int, int] = {}
    for test in scores.abs().sum(1).argsort(descending=True).tolist():
        by_class.setdefault(int(tests[1][test]), test)
    shown = [*by_class.values()][:SHOWN]
    grid = figure.subplots(len(shown), 1 + 2 * COLUMNS, squeeze=False)
    for axes, test in zip(grid, shown, strict=True):
        order = scores[test].argsort().tolist()
        draw_digit(axes[0], tests[0][test], f"test: {tests[1][test]}", "black")
        chosen = [(i, HELPED) for i in order[:COLUMNS]]
        chosen += [(i, HURT) for i in order[: -COLUMNS - 1 : -1]]
        for one, (i, colour) in zip(axes[1:], chosen, strict=True):
            title = f"{examples[1][i]}: {1000 * scores[test, i]:+.2f}"
            draw_digit(one, examples[0][i], title, colour)
    figure.suptitle(
        "Training digits that helped most (blue) and hurt most (red): "
        "label, and 1000 d(test loss) / d(weight)"
    )
    figure.savefig(path, dpi=130)


def draw_digit(axes: Any, image: Tensor, title: str, colour: str) -> None:
    """Draw one image of 8 x 8 pixels."""
    axes.imshow(image.view(8, 8).tolist(), cmap="gray_r")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=8, color=colour)


def show_passages(examples: list[str], tests: list[str], scores: Tensor, count: int = 3) -> str:
    """Return the test passages with the largest scores, and what helped and hurt each most."""
    lines = []
    for test in scores.abs().sum(1).argsort(descending=True)[:SHOWN].tolist():
        lines.append(f"test passage: {tests[test]!r}")
        order = scores[test].argsort().tolist()
        for name, rows in (("helped", order[:count]), ("hurt", order[: -count - 1 : -1])):
            lines += [f"  {name} {1000 * scores[test, i]:+.2f}: {examples[i]!r}" for i in rows]
    return "\n".join(lines)
