"""Judging optimizers over several families, each with its rate tuned on tasks of their own."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.func import vmap

from metaopt import tree
from metaopt.autodiff.replay import Ambient
from metaopt.checks import check_count
from metaopt.extras import extra
from metaopt.log_axis import label_plainly
from metaopt.meta_training.evaluation import TEST_SEED, VALIDATION_SEED
from metaopt.meta_training.running import AnyOptimizer, run_tasks
from metaopt.meta_training.task import TaskFamily, sample_tasks
from metaopt.table import write_table

LARGEST = 20.0  # losses above it, or that are none, count as this
RESAMPLES = 2000

Figure = Literal["mean", "final"]
FIGURES: tuple[Figure, ...] = ("mean", "final")


@dataclass(frozen=True)
class Contender:
    """An optimizer for each rate and number of steps.

    Args:
        make: (rate, T) -> an `Optimizer`, or a function from parameters to a torch optimizer.
        rates: the values among which one is chosen.
        own: the rate that it has untuned, if it has one.
    """

    make: Callable[[float, int], AnyOptimizer]
    rates: tuple[float, ...]
    own: float | None = None

    def __post_init__(self) -> None:
        if not self.rates:
            raise ValueError("Contender: `rates` must hold at least one value, got ().")


class Runs(NamedTuple):
    """Runs at one rate.

    Attributes:
        rate: the rate.
        losses: before each step, [seeds, T]; at most 20.
        accuracy: at the end, on examples that no task sees, [seeds]; None if there are none.
    """

    rate: float
    losses: Tensor
    accuracy: Tensor | None

    def figure(self, of: Figure) -> Tensor:
        """Return the mean over all steps, or over the last tenth of them, [seeds]."""
        count = self.losses.shape[1]
        return self.losses[:, -max(1, count // 10) if of == "final" else 0 :].mean(1)


class Outcome(NamedTuple):
    """What one contender did on one family.

    Attributes:
        mean: at the rate that is best in the mean over the steps.
        final: at the rate that is best in the end, by the mean of ln(loss + first loss / 1000).
        own: untuned, if it has a rate of its own.
    """

    mean: Runs
    final: Runs
    own: Runs | None

    def tuned(self, by: Figure) -> Runs:
        """Return the runs at the rate that was chosen by this figure."""
        return self.mean if by == "mean" else self.final


def judge_family(
    contenders: Mapping[str, Contender],
    family: TaskFamily,
    horizon: int,
    *,
    tuning_seeds: int = 8,
    seeds: int = 12,
) -> dict[str, Outcome]:
    """Tune each contender's rate on some tasks of a family, and run it on others.

    All contenders see the same tasks. Cost: (rates x tuning_seeds + 3 x seeds) episodes each.

    Args:
        contenders: by name.
        family: what the tasks are drawn from.
        horizon: number of steps.
        tuning_seeds: tasks on which the rate is chosen.
        seeds: tasks on which it is judged, at least 2: their spread is looked at.

    Raises:
        ValueError: a number is too small, or a loss is negative.
    """
    check_count(None, "tuning_seeds", tuning_seeds)
    check_count(None, "seeds", seeds, least=2)
    check_count(None, "horizon", horizon)

    def run(contender: Contender, rate: float, count: int, seed: int) -> Runs:
        generator = torch.Generator().manual_seed(seed)
        tasks = sample_tasks(family, generator, count, horizon)
        noise = Ambient.after(generator, tree.leaves(tuple(tasks)))
        losses, ends = run_tasks(contender.make(rate, horizon), family, tasks, noise)
        if bool((losses < 0).any()):
            raise ValueError(
                f"Losses are compared by their ratios, so they must not be negative, got "
                f"{float(losses.min()):.4g} of {type(family).__name__}. Add a constant to the loss."
            )
        losses = losses.nan_to_num(LARGEST, LARGEST, LARGEST).clamp(max=LARGEST)
        return Runs(rate, losses, _accuracy(family, ends))

    outcomes = {}
    for name, contender in contenders.items():
        tuning = [run(contender, rate, tuning_seeds, VALIDATION_SEED) for rate in contender.rates]
        means = [float(runs.figure("mean").mean()) for runs in tuning]
        if min(float(runs.figure("final").mean()) for runs in tuning) >= LARGEST:
            warnings.warn(
                f"{name} diverged at each of its rates on {type(family).__name__}, or all losses "
                f"are above {LARGEST:g}, which count as that. Give smaller rates.",
                stacklevel=2,
            )
        finals = [float(_log_final(runs).mean()) for runs in tuning]
        chosen = [contender.rates[figures.index(min(figures))] for figures in (means, finals)]
        judged = {
            rate: run(contender, rate, seeds, TEST_SEED)
            for rate in {*chosen, *([] if contender.own is None else [contender.own])}
        }
        own = None if contender.own is None else judged[contender.own]
        outcomes[name] = Outcome(judged[chosen[0]], judged[chosen[1]], own)
    return outcomes


def _log_final(runs: Runs) -> Tensor:
    """Return ln(final loss + a thousandth of the first), [seeds].

    Without the latter, a rate at which most runs end at 0 and one diverges would be the best.
    """
    return (runs.figure("final") + 1e-3 * runs.losses[:, 0]).log()


def _accuracy(family: TaskFamily, ends: tree.Tree) -> Tensor | None:
    measure = getattr(family, "accuracy", None)
    if measure is None or measure(tree.index(ends, 0)) is None:
        return None
    found: Tensor = vmap(measure)(ends)
    return found


@dataclass(frozen=True)
class Judgement:
    """How contenders did on several families.

    Attributes:
        outcomes: family -> contender -> what it did.
        reference: the contender that others are compared with.
    """

    outcomes: dict[str, dict[str, Outcome]]
    reference: str

    def __post_init__(self) -> None:
        if not self.outcomes or any(self.reference not in one for one in self.outcomes.values()):
            known = sorted({name for one in self.outcomes.values() for name in one})
            raise ValueError(
                f"Judgement: the reference must be a contender on every family, got "
                f"{self.reference!r}; there are {known}."
            )

    def names(self) -> list[str]:
        """Return the contenders."""
        return list(next(iter(self.outcomes.values())))

    def score(
        self, name: str, against: str, by: Figure = "mean", *, untuned: bool = False
    ) -> tuple[int, int, int]:
        """Return (wins, ties, losses) over the families.

        A win is a mean over seeds that is lower by more than two standard errors of the paired
        difference.

        Args:
            name: the contender.
            against: the other, tuned.
            by: which figure, for which both are tuned.
            untuned: take the contender at its own rate.
        """
        counts = [0, 0, 0]
        for outcomes in self.outcomes.values():
            ours = outcomes[name].own if untuned else outcomes[name].tuned(by)
            if ours is None:
                raise ValueError(
                    f"{name!r} has no rate of its own, so nothing is known of it untuned. Write "
                    "`Contender(make, rates, own=1.0)`."
                )
            gap = ours.figure(by) - outcomes[against].tuned(by).figure(by)
            error = float(gap.std()) / len(gap) ** 0.5
            place = 0 if gap.mean() < -2 * error else 2 if gap.mean() > 2 * error else 1
            counts[place] += 1
        return counts[0], counts[1], counts[2]

    def ratios(self, name: str, by: Figure = "mean") -> Tensor:
        """Return ln(figure / that of the reference), [families, seeds]."""
        rows = [
            (one[name].tuned(by).figure(by) + 1e-12).log()
            - (one[self.reference].tuned(by).figure(by) + 1e-12).log()
            for one in self.outcomes.values()
        ]
        return torch.stack(rows)

    def interquartile(self, name: str, by: Figure = "mean") -> tuple[float, float, float]:
        """Return the interquartile mean of the figure over the reference's, and its interval.

        The mean of the middle half of all families and seeds, and the 95 % interval of a bootstrap
        over the seeds within each family.

        Reference:
            Agarwal et al. 2021, arXiv:2108.13264, section 4.
        """
        ratios = self.ratios(name, by)
        families, seeds = ratios.shape
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randint(seeds, (RESAMPLES, families, seeds), generator=generator)
        drawn = ratios.expand(RESAMPLES, -1, -1).gather(2, chosen)
        means = _middle_mean(drawn.flatten(1)).sort().values
        at = _middle_mean(ratios.flatten()[None])[0]
        low, high = means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES)]
        return math.exp(at), math.exp(low), math.exp(high)

    def speed(self, name: str) -> dict[str, float]:
        """Return family -> steps to the reference's tuned final loss, over T; inf if never."""
        found = {}
        for family, one in self.outcomes.items():
            goal = float(one[self.reference].final.figure("final").mean())
            curve = one[name].final.losses.mean(0)
            width = max(1, len(curve) // 20)
            smooth = curve.unfold(0, width, 1).mean(1)
            reached = (smooth <= goal).nonzero()
            steps = math.inf if not len(reached) else int(reached[0]) + width
            found[family] = steps / len(curve)
        return found

    def table(self, by: Figure = "mean") -> str:
        """Return a row for each family, with every contender's figure, tuned, and untuned."""
        columns: list[str] = []
        figures: list[list[float]] = []  # of each column
        for name in self.names():
            outcomes = [one[name] for one in self.outcomes.values()]
            own = [one.own for one in outcomes if one.own is not None]
            kinds = [(name, [one.tuned(by) for one in outcomes]), (f"{name}, untuned", own)]
            for title, runs in kinds:
                if len(runs) == len(outcomes):
                    columns.append(title)
                    figures.append([float(one.figure(by).mean()) for one in runs])
        rows = [[family, *row] for family, *row in zip(self.outcomes, *figures, strict=True)]
        return write_table([f"{by} loss", *columns], rows, ["", *[".4f"] * len(columns)])

    def accuracies(self) -> str:
        """Return a row for each family whose results are classified, tuned for the final loss."""
        known = {
            family: one
            for family, one in self.outcomes.items()
            if all(outcome.final.accuracy is not None for outcome in one.values())
        }
        if not known:
            return ""
        rows: list[list[str | float]] = [
            [family, *(float(one[name].final.accuracy.mean()) for name in self.names())]  # type: ignore[union-attr]
            for family, one in known.items()
        ]
        headers = ["accuracy", *self.names()]
        return write_table(headers, rows, ["", *[".4f"] * len(self.names())])

    def summary(self) -> str:
        """Return a row for each contender: what it did over all families."""
        headers = [
            "contender",
            "mean loss / reference",
            "final loss / reference",
            f"wins-ties-losses against {self.reference}: mean",
            "final",
            "untuned, mean",
            "steps to its final loss, median part of T",
            "diverged",
        ]
        rows: list[list[str | float]] = []
        for name in self.names():
            ratios = [self.interquartile(name, by) for by in FIGURES]
            scores = [self.score(name, self.reference, by) for by in FIGURES]
            has_own = all(one[name].own is not None for one in self.outcomes.values())
            untuned = self.score(name, self.reference, untuned=True) if has_own else None
            speeds = torch.tensor(list(self.speed(name).values()))
            ends = [one[name].final for one in self.outcomes.values()]
            lost = [(runs.losses[:, -1] > runs.losses[:, 0]).float().mean() for runs in ends]
            rows.append(
                [
                    name,
                    *(f"{at:.3f} ({low:.3f} to {high:.3f})" for at, low, high in ratios),
                    *("-".join(map(str, score)) for score in scores),
                    "-".join(map(str, untuned)) if untuned else "",
                    f"{float(speeds.median()):.2f}",
                    f"{float(torch.stack(lost).mean()):.1%}",
                ]
            )
        return write_table(headers, rows, [""] * len(headers))

    def as_dict(self) -> dict[str, Any]:
        """Return all figures in JSON's types, by family, contender and how it was tuned."""

        def numbers(runs: Runs) -> dict[str, Any]:
            figures: dict[str, Any] = {"rate": runs.rate}
            for by in FIGURES:
                values = runs.figure(by)
                figures[by] = float(values.mean())
                figures[f"{by}, standard error"] = float(values.std()) / len(values) ** 0.5
            if runs.accuracy is not None:
                figures["accuracy"] = float(runs.accuracy.mean())
            return figures

        return {
            family: {
                name: {
                    how: numbers(runs)
                    for how, runs in outcome._asdict().items()
                    if runs is not None
                }
                for name, outcome in one.items()
            }
            for family, one in self.outcomes.items()
        }

    def plot(self, path: str | Path) -> None:
        """Draw the mean curves of each family, at the rates tuned for the mean, into a file."""
        with extra("`Judgement.plot`"):
            from matplotlib.figure import Figure as Sheet

        columns = min(4, len(self.outcomes))
        rows = -(-len(self.outcomes) // columns)
        sheet = Sheet(figsize=(3.6 * columns, 3 * rows + 0.6), layout="constrained")
        for place, (family, one) in enumerate(self.outcomes.items()):
            axes = sheet.add_subplot(rows, columns, place + 1)
            for name, outcome in one.items():
                curve = outcome.mean.losses.mean(0)
                width = max(1, len(curve) // 50)
                axes.plot(curve.unfold(0, width, 1).mean(1), label=name, linewidth=1.2)
            axes.set(title=family, yscale="log", xlabel="inner step")
            label_plainly(axes.yaxis)
            axes.grid(alpha=0.3)
        handles, labels = sheet.axes[0].get_legend_handles_labels()
        sheet.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        sheet.savefig(path, dpi=150)


def _middle_mean(rows: Tensor) -> Tensor:
    """Return the mean of the middle half of each row."""
    count = rows.shape[1]
    cut = count // 4
    return rows.sort(1).values[:, cut : count - cut].mean(1)
