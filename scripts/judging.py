"""The table of optimizers over the held-out families, for `evaluate.py --task held-out`.

`--write` publishes it: the figures in benchmarks/carrying-over.json beside those of others, and the
tables in docs/pages/results/learned-optimizers.md and docs/pages/get-started.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_report import between
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import metaopt as mo
from metaopt.meta_training.judging import FIGURES as COMPARED
from metaopt.meta_training.judging import Outcome, Runs
from metaopt.optimizer import Hyper, Leaves, Slots, set_hyperparameter
from optimizers import SGD, Adam, Cosine, Muon, Transform

ROOT = Path(__file__).parents[1]
FIGURES = "benchmarks/carrying-over.json"
OF_GET_STARTED = ("Adam", "Adam, cosine", "Muon, cosine", "small")
SPECIALISTS = ("lstm", "mlp", "schedule")  # trained on one task each: in a table of their own
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


def at_recorded_rates(
    contenders: dict[str, mo.Contender], recorded: dict[str, Any]
) -> dict[str, mo.Contender]:
    """Return the contenders, with only the rates that were best before where those are known.

    Their runs are needed again for paired differences, but not their tuning, which is most of the
    cost.

    Args:
        contenders: by name.
        recorded: of one family, as `Judgement.as_dict` writes it.
    """
    return {
        name: replace(one, rates=tuple({recorded[name][by]["rate"] for by in ("mean", "final")}))
        if name in recorded
        else one
        for name, one in contenders.items()
    }


def judge(
    contenders: dict[str, mo.Contender],
    families: dict[str, mo.tasks.HeldOut],
    reference: str,
    seeds: int,
    tuning_seeds: int,
    out: Path,
    recorded: dict[str, Any],
    resume: bool = False,
) -> mo.Judgement:
    """Judge on one family after the other, and write what is known after each.

    `recorded` has what is known already of contenders, by family: see `at_recorded_rates`. With
    `resume`, families whose outcomes are in `out` are not judged again.
    """
    outcomes: dict[str, dict[str, Outcome]] = {}
    for name, (family, horizon) in (progress := tqdm(families.items(), mininterval=1)):
        progress.set_description(name)
        started = time.process_time()
        path = out / f"{name}.safetensors"
        if resume and path.is_file():
            outcomes[name] = load_outcomes(path)
            continue
        outcomes[name] = mo.judge_family(
            at_recorded_rates(contenders, recorded.get(name, {})),
            family,
            horizon,
            tuning_seeds=tuning_seeds,
            seeds=seeds,
        )
        judgement = mo.Judgement(outcomes, reference)
        out.mkdir(parents=True, exist_ok=True)
        (out / "judgement.json").write_text(json.dumps(judgement.as_dict(), indent=2) + "\n")
        save_outcomes(outcomes[name], path)
        progress.write(f"{name}: {time.process_time() - started:.0f} CPU seconds")
    return mo.Judgement(outcomes, reference)


def save_outcomes(outcomes: dict[str, Outcome], path: Path) -> None:
    """Write what contenders did on one family into a file."""
    tensors, rates = {}, {}
    for name, outcome in outcomes.items():
        for how, runs in outcome._asdict().items():
            if runs is not None:
                rates[f"{name}/{how}"] = runs.rate
                tensors[f"{name}/{how}/losses"] = runs.losses.clone()  # two may be the same runs
                if runs.accuracy is not None:
                    tensors[f"{name}/{how}/accuracy"] = runs.accuracy.clone()
    save_file(tensors, path, metadata={"rates": json.dumps(rates)})


def load_outcomes(path: Path) -> dict[str, Outcome]:
    """Read what `save_outcomes` wrote."""
    with safe_open(path, "pt") as file:
        rates = json.loads(file.metadata()["rates"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    runs = {
        key: Runs(rate, tensors[f"{key}/losses"], tensors.get(f"{key}/accuracy"))
        for key, rate in rates.items()
    }
    names = dict.fromkeys(key.rpartition("/")[0] for key in rates)
    return {
        name: Outcome(*(runs.get(f"{name}/{how}") for how in Outcome._fields)) for name in names
    }


def recorded_figures(names: Sequence[str], root: Path = ROOT) -> dict[str, Any]:
    """Return what was published of these contenders, by family."""
    families = json.loads((root / FIGURES).read_text())["families"]
    return {
        family: {name: one[name] for name in names if name in one}
        for family, one in families.items()
    }


def publish(judgement: mo.Judgement, root: Path = ROOT) -> None:
    """Write the figures and the tables made of them into the project.

    What stands there of other contenders is kept.

    Raises:
        ValueError: a family of the published table was not judged.
    """
    path = root / FIGURES
    figures = json.loads(path.read_text()) if path.is_file() else {"families": {}, "summary": {}}
    found = judgement.as_dict()
    if missing := figures["families"].keys() - found.keys():
        raise ValueError(
            f"A summary is over all families, got none of {sorted(missing)}. Leave `--families` "
            "out to publish."
        )
    figures["reference"] = judgement.reference
    for family, outcomes in found.items():
        figures["families"].setdefault(family, {}).update(outcomes)
    for name in judgement.names():
        entry = figures["summary"].setdefault(name, {})
        entry["mean, interquartile"] = judgement.interquartile(name, "mean")
        entry["final, interquartile"] = judgement.interquartile(name, "final")
        for title, scores in _scores(judgement, name).items():
            entry.setdefault(title, {}).update(scores)
    path.write_text(json.dumps(figures, indent=1) + "\n")
    page = root / "docs/pages/get-started.md"
    page.write_text(between(page.read_text(), "carrying over", markdown(figures, OF_GET_STARTED)))
    page = root / "docs/pages/results/learned-optimizers.md"
    text = between(page.read_text(), "carrying over", markdown(figures, None))
    page.write_text(between(text, "specialists", specialists(figures)))


def _scores(judgement: mo.Judgement, name: str) -> dict[str, dict[str, tuple[int, int, int]]]:
    """Return wins, ties and losses against each contender, by what is compared."""
    has_own = all(one[name].own is not None for one in judgement.outcomes.values())
    return {
        f"{'untuned ' if untuned else ''}against each, {by}": {
            other: judgement.score(name, other, by, untuned=untuned) for other in judgement.names()
        }
        for untuned in (False, True)[: 1 + has_own]
        for by in COMPARED
    }


def markdown(figures: dict[str, Any], columns: Sequence[str] | None) -> str:
    """Return the mean losses, and for all columns (None) the final losses too, as Markdown.

    Args:
        figures: what `publish` wrote.
        columns: names of contenders; None for all but the specialists.
    """
    first = next(iter(figures["families"].values()))
    names = [name for name in first if name not in SPECIALISTS]
    if columns is not None:
        names = [name for name in columns if name in first]
    tables = [_table(figures["families"], names, "mean")]
    if columns is None:
        tables += [_table(figures["families"], names, "final"), _accuracies(figures, names)]
    return "\n\n".join(tables)


def specialists(figures: dict[str, Any]) -> str:
    """Return the mean losses of optimizers that were trained on one task, and their scores."""
    names = [name for name in SPECIALISTS if name in figures["summary"]]
    scores = [
        [f"{by}, against {other}"]
        + [
            "-".join(map(str, figures["summary"][name][f"{how}against each, {by}"][other]))
            for how in ("", "untuned ")
            for name in names
        ]
        for other in ("Adam", "Adam, cosine")
        for by in COMPARED
    ]
    losses = _table(figures["families"], ["Adam", "Adam, cosine", *names], "mean")
    heads = ["won-undecided-lost", *names, *(f"{name}, untuned" for name in names)]
    return "\n\n".join([losses, _lines(heads, scores)])


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
