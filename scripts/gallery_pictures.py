"""How `draw_gallery.py` draws each program: from its run folder and output, or from benchmarks/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gallery_plots import (
    OTHER,
    OURS,
    THIRD,
    draw_bars,
    draw_dots,
    draw_points,
    make_figure,
    read_row,
)

from metaopt.extras import extra

with extra("scripts/draw_gallery.py"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def weight_decay(run: Path, printed: str) -> Any:
    figure, axes = make_figure(2.2)
    names = {"exact": ("exact: Backprop", OTHER), "CG(3)": ("implicit: 3 steps of CG", OURS)}
    for name, (label, colour) in names.items():
        axes.plot(read_row(printed, name), (3, 2, 1), "o", color=colour, label=label)
    axes.set_yticks((3, 2, 1), [f"data set {number}" for number in range(3)])
    axes.set(xlabel="validation loss (nats) after 20 steps on the decays", ylim=(0.5, 3.5))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(frameon=False, loc="outside upper center", ncols=2)
    return figure


def implicit_maml(run: Path, printed: str) -> Any:
    figure, axes = make_figure(1.9)
    names = ("no meta-learning", "MAML", "implicit MAML")
    draw_bars(axes, {name: 100 * read_row(printed, name)[0] for name in names}, names[2:])
    axes.set_xlabel("accuracy on 500 new tasks (%), chance is 20")
    return figure


def implicit_middle(run: Path, printed: str) -> Any:
    rows = [line.strip(" []").split() for line in printed.split("by pixel:")[1].splitlines()]
    strengths = [[float(value) for value in row] for row in rows if row]
    figure, axes = make_figure(2.8, width=3.8)
    image = axes.imshow(strengths, cmap="viridis")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="learned log strength of a pixel")
    return figure


def learning_by_ignoring(run: Path, printed: str) -> Any:
    names = {
        "all": "equal weights",
        "all, finetuned on more": "equal, finetuned on more",
        "learned": "learned weights",
        "all that are right": "right labels only (oracle)",
    }
    figure, axes = make_figure(2.2)
    values = {label: read_row(printed, name + " ")[0] for name, label in names.items()}
    draw_dots(axes, values, ["learned weights"])
    axes.set_xlabel("test accuracy (%), mean of 5 seeds")
    return figure


def learning_rate_of_learning_rate(run: Path, printed: str) -> Any:
    figure, axes = make_figure(1.9)
    names = ("fixed rate", "learned rate", "learned rate of learned rate")
    values = {name: read_row(printed, name)[0] for name in names}
    draw_bars(axes, values, names[2:], form="{:.3f}")
    axes.set_xlabel("test loss (nats) after 600 steps")
    return figure


def domains(run: Path, printed: str) -> Any:
    figure, (left, right) = make_figure(2.2, 2, width=7.6)
    names = {"target only": "target only", "equal, all": "equal", "learned, all": "learned"}
    values = {label: read_row(printed, name)[0] for name, label in names.items()}
    draw_dots(left, values, ["learned"])
    left.set_xlabel("accuracy on the target (%)")
    weights = printed.split("weights over their mean: ")[1].split(", ")
    shares = {name: float(value) for name, value in (part.split() for part in weights)}
    kinds = {"movie": "like the target", "amazon": "different", "editorial": "opposite labels"}
    draw_bars(right, {kinds[name]: share for name, share in shares.items()}, [*kinds.values()])
    right.set_xlabel("learned weight of a domain / mean")
    return figure


def virtual_step(run: Path, printed: str) -> Any:
    names = ("equal weights", "weight net")
    groups = {name: read_row(printed, name)[1:] for name in names}
    figure, axes = make_figure(1.7)
    draw_points(axes, groups, names[1:])
    axes.set_xlabel("test accuracy (%) of each seed; tick: mean")
    return figure


def architecture_search(run: Path, printed: str) -> Any:
    seeds = [read_row(printed, str(seed))[:3] for seed in range(3)]
    derived, median, best = (list(column) for column in zip(*seeds))
    groups = {"median of 8 random": median, "derived": derived, "best of 8 random": best}
    figure, axes = make_figure(2.0)
    draw_points(axes, groups, ["derived"])
    axes.set_xlabel("test accuracy (%) of each seed; tick: mean")
    return figure


def bars_with_errors(printed: str, names: tuple[str, ...], scale: float = 1.0) -> Any:
    """Draw (mean, standard error) of each name; the last one is ours."""
    rows = {name: [scale * abs(x) for x in read_row(printed, name)[:2]] for name in names}
    figure, axes = make_figure(0.9 + 0.35 * len(names))
    form, errors = "{:.1f}" if scale > 1 else "{:.3f}", [error for _, error in rows.values()]
    draw_bars(axes, {k: v for k, (v, _) in rows.items()}, names[-1:], form=form, errors=errors)
    return figure, axes


def meta_sgd(run: Path, printed: str) -> Any:
    names = tuple(f"MAML, rate {rate}" for rate in ("0.003", "0.01", "0.03"))
    figure, axes = bars_with_errors(printed, (*names, "Meta-SGD"))
    axes.set_xlabel("squared error on new waves after one step, ± standard error")
    return figure


def meta_curvature(run: Path, printed: str) -> Any:
    figure, axes = bars_with_errors(printed, ("MAML", "Meta-Curvature"), 100.0)
    axes.set_xlabel("accuracy on 1000 new tasks (%), ± standard error, chance is 20")
    return figure


def maml_plus_plus(run: Path, printed: str) -> Any:
    figure, axes = make_figure(1.6)
    names = ("MAML", "MAML++")
    draw_bars(axes, {name: 100 * read_row(printed, name)[0] for name in names}, names[1:])
    axes.set_xlabel("accuracy on 400 new tasks (%), chance is 20")
    return figure


def train_optimizer(run: Path, printed: str) -> Any:
    figure, axes = make_figure(2.6)
    begin, parts = 0, ((run, "windows of 10", OURS), (run / "finish", "whole runs", THIRD))
    for folder, label, colour in parts:
        events = EventAccumulator(str(folder), {"scalars": 0}).Reload()
        points = events.Scalars("validation")
        steps = [begin + point.step for point in points]
        axes.plot(steps, [p.value for p in points], "o-", ms=4, color=colour, label=label)
        begin = steps[-1]
    axes.set(xlabel="outer step", ylabel="validation loss (nats)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    return figure


def train_on_families(run: Path, printed: str) -> Any:
    families = json.loads((BENCHMARKS / "carrying-over.json").read_text())["families"]
    figure, axes = make_figure(3.2, width=6.4)
    names = [*families][::-1]
    sides = {"Adam, cosine": OTHER, "Muon, cosine": THIRD, "small": OURS}
    for name, colour in sides.items():
        ratios = [
            families[family][name]["mean"]["mean"] / families[family]["Adam"]["mean"]["mean"]
            for family in names
        ]
        axes.plot(ratios, range(len(names)), "o", color=colour, label=name)
    axes.axvline(1, color="black", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="mean loss of training / that of tuned Adam", xscale="log")
    axes.set_xticks([0.5, 0.7, 1, 1.4], ["0.5", "0.7", "1", "1.4"])
    axes.set_xticks([], minor=True)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(frameon=False)
    return figure


def compare_inner_rates(run: Path, printed: str) -> Any:
    found = json.loads((BENCHMARKS / "schedules.json").read_text())
    figure, panels = make_figure(2.6, 2, width=7.0)
    seeds = {"MAML": "maml, 10 shots, 5 steps, seeds 10 to 17"}
    seeds["Reptile"] = "reptile, 10 shots, 5 steps, seeds 0 to 9"
    for axes, (name, key) in zip(panels, seeds.items()):
        rows = found[key]["rows"]
        constant, tensors = (
            next(row["seeds"] for label, row in rows.items() if part in label)
            for part in ("constant", "each tensor")
        )
        for pair in zip(constant, tensors):
            axes.plot((0, 1), pair, "o-", color=OURS, alpha=0.6, ms=4)
        axes.set_xticks((0, 1), ("tuned constant rate", "a schedule a tensor"))
        axes.set(title=f"{name}, {len(constant)} trainings", xlim=(-0.3, 1.3), ylim=(0, None))
    panels[0].set_ylabel("squared error on new waves")
    return figure


def data_attribution(run: Path, printed: str) -> Any:
    methods = json.loads((BENCHMARKS / "attribution.json").read_text())["digits"]["methods"]
    scores = {name: one["score"] for name, one in methods.items()}
    best = dict(sorted(scores.items(), key=lambda item: -item[1]))
    figure, axes = make_figure(2.9)
    draw_bars(axes, best, ["exact metagradient"], form="{:.2f}")
    axes.set_xlabel("rank correlation of scores with retrainings")
    return figure


def train_schedule(run: Path, printed: str) -> Any:
    entries = json.loads((BENCHMARKS / "schedules.json").read_text())
    rows = entries["adam, final loss, 100 steps: gp lstm mlp attention policy"]["test"]
    losses = {row["name"].split(": ")[1]: row["final"] for row in rows if "learned" in row["name"]}
    losses |= {f"best {row['name'].split(',')[0]}": row["final"] for row in rows[-2:]}
    best = dict(sorted(losses.items(), key=lambda item: item[1]))
    figure, axes = make_figure(2.6)
    draw_bars(axes, best, [name for name in best if "best" not in name], form="{:.4f}")
    axes.set_xlabel("final loss of Adam on the digits (nats), mean of 256 runs")
    return figure


def meta_weight_net(run: Path, printed: str) -> Any:
    names = ("plain", "clean only", "meta-weight-net", "oracle")
    rows = {name: read_row(printed, name)[:2] for name in names}
    figure, axes = make_figure(2.2)
    errors = [error for _, error in rows.values()]
    draw_dots(axes, {k: v for k, (v, _) in rows.items()}, names[2:3], errors=errors)
    axes.set_xlabel("test accuracy (%), 40 % wrong labels, ± standard error")
    return figure


def bench(run: Path, printed: str) -> Any:
    lines = (BENCHMARKS / "history.jsonl").read_text().splitlines()
    newest = [
        line
        for line in map(json.loads, lines)
        if (line["comparison"], line["kind"], line["threads"]) == ("sinusoid", "times", 1)
    ][-1]
    ours = ("metaopt", "metaopt, compiled")
    figure, axes = make_figure(2.6)
    draw_bars(axes, newest["ratios"], ours, form="{:.2g}")
    axes.set(xlabel="meta-gradients of MAML a second, times those of higher", xscale="log")
    axes.set_xlim(0.8, 200)
    axes.set_xticks((1, 10, 100), ("1", "10", "100"))
    return figure


def compare_choices(run: Path, printed: str) -> Any:
    found = json.loads((BENCHMARKS / "choices.json").read_text())["rules"]["found"]
    rows = found["example weights"]["rows"]
    cosines = {
        name.removeprefix("Implicit(").split("(")[0]: row["late"]["cosine"]
        for name, row in rows.items()
        if "window" not in name and "memory" not in name
    }
    figure, axes = make_figure(3.4)
    draw_bars(axes, cosines, ("Backprop",), form="{:.3f}")
    axes.set(xlabel="cosine with the exact hypergradient")
    return figure


def scaling(run: Path, printed: str) -> Any:
    shown = {
        "MAML: 1,024 tasks, conv-4": "MAML, convolutions",
        "MAML: 1,024 tasks, MLP": "MAML, small MLP",
        "PES with seeds": "PES, 4,096 pairs",
        "SAMA: 110 million": "SAMA, 110 million parameters",
    }
    figure, axes = make_figure(2.6)
    for start, label in shown.items():
        rows = [line for line in printed.splitlines() if start in line and "Ethernet" in line]
        shares = [float(cell.strip(" %")) for cell in rows[0].split("|")[5:8]]
        axes.plot((8, 64, 1024), shares, "o-", ms=4, label=label)
    axes.set(xscale="log", xlabel="processes, 25 Gb/s Ethernet", ylabel="efficiency (%)")
    axes.set_xticks((8, 64, 1024), ("8", "64", "1024"))
    axes.set_xticks([], minor=True)
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def language_model(run: Path, printed: str) -> Any:
    """Draw what benchmarks/programs.json has of all seeds: their trainings take ten minutes."""
    recorded = json.loads((ROOT / "benchmarks/programs.json").read_text())
    lines = recorded["language_model"]["printed"]
    (*_, start) = (place for place, line in enumerate(lines) if " sources, " in line)
    names = {
        "static": "static",
        "dynamic evaluation": "dynamic evaluation",
        "meta-learned start and optimizer": "learned start and optimizer",
        "meta-learned start and rates": "learned start and rates",
    }
    values = {}
    for name, label in names.items():
        row = next(line for line in lines[start:] if line.startswith(f"| {name} "))
        values[label] = float(row.split("|")[2].split()[0])
    figure, axes = make_figure(2.2)
    draw_dots(axes, values, list(values)[2:], form="{:.3f}")
    axes.set_xlabel("bits per character of 40 sources, for equal text")
    return figure


def few_shot_curves(printed: str, names: dict[str, str]) -> Any:
    """Draw mean errors and their 95 % intervals over the number of gradient steps."""
    steps = read_row(printed.replace("| gradient steps", "gradient steps"), "gradient steps")
    steps = steps[1:]  # the first number is the inner rate
    figure, axes = make_figure(2.6)
    for name, colour in names.items():
        numbers = [abs(number) for number in read_row(printed, name)]
        mean, margin = numbers[::2], numbers[1::2]
        low, high = zip(*((m - e, m + e) for m, e in zip(mean, margin)))
        axes.plot(steps, mean, "o-", ms=4, color=colour, label=name.split(",")[0])
        axes.fill_between(steps, low, high, color=colour, alpha=0.25, lw=0)
    axes.set(xlabel="gradient steps on a new wave", ylabel="mean squared error", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def maml(run: Path, printed: str) -> Any:
    return few_shot_curves(printed, {"MAML": OURS, "pretrained, rate tuned": OTHER})


def reptile(run: Path, printed: str) -> Any:
    return few_shot_curves(printed, {"Reptile": OURS})
