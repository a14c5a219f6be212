"""The table of optimizers over the held-out families, for `evaluate.py --task held-out`.

`--write` publishes it: the figures in benchmarks/carrying-over.json, tables in docs/results.md and
README.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_report import between
from tqdm import tqdm

import metaopt as mo
from metaopt.optimizer import Hyper, Leaves, Slots, set_hyperparameter
from optimizers import SGD, Adam, Cosine, Muon, Transform

ROOT = Path(__file__).parents[1]
FIGURES = "benchmarks/carrying-over.json"
OF_README = ("Adam", "Adam, cosine", "Muon, cosine", "small")
QUARTERS = tuple(10 ** (i / 4) for i in range(14))
OF_ADAM = tuple(3.16e-4 * quarter for quarter in QUARTERS)
OF_SGD = tuple(1e-3 * quarter for quarter in QUARTERS)
OF_LEARNED = tuple(0.0562 * quarter for quarter in QUARTERS)


class MuonAndAdam(mo.Optimizer):
    """Muon for matrices and filters of convolutions, Adam for all other parameters, at one rate.

    A filter is a matrix [channels out, the rest]. The factor on Muon's updates is that of Liu et
    al. 2025, arXiv:2502.16982, by which both kinds of steps are of one size.
    """

    hyperparameters = ("lr",)

    def __init__(self, lr: mo.Schedule | float):
        super().__init__()
        set_hyperparameter(self, "lr", lr)
        self.muon = Muon(1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adam = Adam(1.0)

    def slots(self, params: Leaves) -> Slots:
        return self.adam.slots(params)

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: torch.Tensor
    ) -> tuple[Leaves, Slots]:
        rate = {"lr": hyper["lr"]}
        adam = {name: getattr(self.adam, name) for name in self.adam.hyperparameters} | rate
        updates, after = self.adam.update(grads, params, slots, adam, step)
        for i, grad in enumerate(grads):
            if grad.ndim > 1:
                own = {"mean": [slots["mean"][i].flatten(1)]}
                muon = {name: getattr(self.muon, name) for name in self.muon.hyperparameters} | rate
                (moved,), own = self.muon.update([grad.flatten(1)], None, own, muon, step)
                updates[i], after["mean"][i] = moved.view_as(grad), own["mean"][0].view_as(grad)
        return updates, after


class Scaled(Transform):
    """Updates times one factor."""

    hyperparameters = ("factor",)

    def __init__(self, factor: float, optimizer: mo.Optimizer):
        super().__init__(optimizer, factor=factor)

    def after(self, updates: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        return [hyper["factor"] * update for update in updates]


Make = Callable[[mo.Schedule | float], mo.Optimizer]
HAND_DESIGNED: dict[str, tuple[Make, tuple[float, ...]]] = {
    "Adam": (Adam, OF_ADAM),
    "Nesterov": (lambda lr: SGD(lr, momentum=0.9, nesterov=True), OF_SGD),
    "Muon": (MuonAndAdam, OF_ADAM),
}


def hand_designed(names: Sequence[str]) -> dict[str, mo.Contender]:
    """Return each optimizer with a constant rate, and with a cosine."""
    found = {}
    for name in names:
        make, rates = HAND_DESIGNED[name]
        found[name] = mo.Contender(lambda lr, steps, make=make: make(lr), rates)
        found[f"{name}, cosine"] = mo.Contender(
            lambda lr, steps, make=make: make(Cosine(lr, steps)), rates
        )
    return found


def learned(optimizer: mo.Optimizer) -> mo.Contender:
    """Return a learned optimizer with one factor on its updates; untuned it is 1."""
    return mo.Contender(lambda rate, _: Scaled(rate, optimizer), OF_LEARNED, own=1.0)


def judge(
    contenders: dict[str, mo.Contender],
    families: dict[str, mo.tasks.HeldOut],
    reference: str,
    seeds: int,
    tuning_seeds: int,
    out: Path,
) -> mo.Judgement:
    """Judge on one family after the other, and write what is known after each."""
    outcomes: dict[str, dict[str, mo.Outcome]] = {}
    for name, (family, horizon) in (progress := tqdm(families.items(), mininterval=1)):
        progress.set_description(name)
        started = time.process_time()
        outcomes[name] = mo.judge_family(
            contenders, family, horizon, tuning_seeds=tuning_seeds, seeds=seeds
        )
        judgement = mo.Judgement(outcomes, reference)
        out.mkdir(parents=True, exist_ok=True)
        (out / "judgement.json").write_text(json.dumps(judgement.as_dict(), indent=2) + "\n")
        progress.write(f"{name}: {time.process_time() - started:.0f} CPU seconds")
    return judgement


def publish(judgement: mo.Judgement, root: Path = ROOT) -> None:
    """Write the figures and the tables made of them into the project."""
    figures = {"reference": judgement.reference, "families": judgement.as_dict()}
    figures["summary"] = {
        name: {
            "mean, interquartile": judgement.interquartile(name, "mean"),
            "final, interquartile": judgement.interquartile(name, "final"),
            "against each, mean": {
                other: judgement.score(name, other, "mean") for other in judgement.names()
            },
            "against each, final": {
                other: judgement.score(name, other, "final") for other in judgement.names()
            },
        }
        for name in judgement.names()
    }
    (root / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
    for page, columns in (("README.md", OF_README), ("docs/results.md", None)):
        path = root / page
        path.write_text(between(path.read_text(), "carrying over", markdown(figures, columns)))


def markdown(figures: dict[str, Any], columns: Sequence[str] | None) -> str:
    """Return the mean losses, and for all columns (None) the final losses too, as Markdown.

    Args:
        figures: what `publish` wrote.
        columns: names of contenders.
    """
    first = next(iter(figures["families"].values()))
    names = list(first) if columns is None else [name for name in columns if name in first]
    tables = [_table(figures["families"], names, "mean")]
    if columns is None:
        tables += [_table(figures["families"], names, "final"), _accuracies(figures, names)]
    return "\n\n".join(tables)


def _table(families: dict[str, Any], names: Sequence[str], by: str) -> str:
    heads = [(name, by) for name in names]
    heads += [
        (name, "own") for name in names if all("own" in one[name] for one in families.values())
    ]
    titles = [name if how == by else f"{name}, untuned" for name, how in heads]
    rows = [
        [family, *(f"{one[name][how][by]:.4f}" for name, how in heads)]
        for family, one in families.items()
    ]
    return _lines([f"{by} loss", *titles], rows)


def _accuracies(figures: dict[str, Any], names: Sequence[str]) -> str:
    rows = [
        [family, *(f"{one[name]['final']['accuracy']:.4f}" for name in names)]
        for family, one in figures["families"].items()
        if "accuracy" in one[names[0]]["final"]
    ]
    return _lines(["accuracy, tuned for the final loss", *names], rows)


def _lines(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])
