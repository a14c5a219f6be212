"""Figures that pages show are those of the files in benchmarks/, which scripts wrote.

A page that was edited by hand, or a file that was written anew without its page, fails here.
Nothing is measured: text is compared with text.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
RESULTS = "docs/pages/results/index.md"
LEARNED = "docs/pages/results/learned-optimizers.md"
SCHEDULES = "docs/pages/results/schedules.md"
LABELS = "docs/pages/results/noisy-labels.md"
SCORES = "docs/pages/results/attribution.md"
LANGUAGE = "docs/pages/results/language-model.md"
BENCHMARKS = "docs/pages/benchmarks.md"


@pytest.fixture(autouse=True)
def _scripts_on_path(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))


def page(name: str) -> str:
    return (ROOT / name).read_text()


def figures(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / name).read_text())


def rows_of(name: str, below: str = "") -> list[list[str]]:
    """Return the cells of every row of the page's tables, from the text `below` on."""
    text = page(name)
    lines = text[text.index(below) :].splitlines()
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines if line[:1] == "|"]


def says(name: str, *sentences: str) -> None:
    """Assert that the page has the sentences, wherever its lines break."""
    text = " ".join(page(name).split())
    for sentence in sentences:
        assert sentence in text, sentence


def short(value: float, digits: int) -> str:
    """Return the number without a zero in front, as the pages write it."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.{digits}f}")


# Written by bench.py


def newest() -> dict[tuple[str, str, int], dict[str, Any]]:
    from bench_history import read

    lines = read(ROOT / "benchmarks" / "history.jsonl")
    return {(line["comparison"], line["kind"], line["threads"]): line for line in lines}


def medians(comparison: str) -> dict[str, float]:
    return newest()[comparison, "times", 1]["medians"]


def grown(comparison: str, steps: int = 1) -> dict[str, int]:
    """Return by how many bytes each side grew."""
    sides = newest()[comparison, "memory", 1]["memory"]
    return {name: points[str(steps)][0] for name, points in sides.items()}


def test_the_ratios_of_the_readme() -> None:
    from bench_history import headlines, read
    from bench_report import between

    readme = page("README.md")
    ratios = headlines(read(ROOT / "benchmarks" / "history.jsonl"))
    assert readme == between(readme, "ratios", ratios)


def test_the_steps_of_learned_optimizers() -> None:
    from bench_history import read, step_costs
    from bench_report import between

    guide = page("docs/pages/guides/learned-optimizers.md")
    costs = step_costs(read(ROOT / "benchmarks" / "history.jsonl"))
    assert guide == between(guide, "optimizer steps", costs)


def test_the_tables_of_the_benchmarks() -> None:
    """Medians, ratios and, of memory, sizes."""
    from bench_report import duration, size

    rows = rows_of(BENCHMARKS)
    cells = {(row[0], cell) for row in rows for cell in row[1:]}
    for line in newest().values():
        says(BENCHMARKS, line["date"], line["commit"], *(map(" ".join, line["versions"].items())))
        for name, seconds in line.get("medians", {}).items():
            ratio = f"{line['ratios'][name]:.3g}"
            found = [row for row in rows if row[:2] == [name, duration(seconds)]]
            assert any(row[3] == ratio for row in found), (line["comparison"], name, ratio)
        for name, points in line.get("memory", {}).items():
            for bytes_, seconds in points.values():
                if seconds is not None:
                    assert (name, f"{size(bytes_)}, {duration(seconds)}") in cells


def test_where_ours_is_slower() -> None:
    """What the page says of it in words."""
    nres, darts, sama = map(medians, ("meta-training-nres", "scale-darts", "scale-sama"))
    memory = {
        name: grown(f"scale-{name}")["metaopt"] / grown(f"scale-{name}")["PyTorch by hand"]
        for name in ("darts", "sama", "darts-frozen", "sama-frozen")
    }
    jax = nres["JAX jit, vmap, scan"]
    cg = [
        medians(f"bilevel-{condition}")["metaopt, CG"]
        / medians(f"bilevel-{condition}")["PyTorch by hand, CG"]
        for condition in (10000, 100)
    ]
    attention = medians("attention")
    says(
        BENCHMARKS,
        f"takes {nres['metaopt, compiled'] / jax:.1f} times as long as in JAX when it is compiled, "
        f"and {nres['metaopt'] / jax:.1f} times when it is not",
        f"grows by {memory['darts']:.2f} times as much as by hand",
        f"With SAMA at the last step it is {memory['sama']:.2f} times",
        f"With the lower layers frozen, {memory['darts-frozen']:.2f} times",
        f"SAMA takes {sama['metaopt'] / darts['metaopt']:.2f} times as long as finite differences",
        f"takes {cg[0]:.1f} to {cg[1]:.1f} times as long as by hand at 1,000 dimensions",
        f"takes {attention['metaopt'] / attention['PyTorch, its plain kernel']:.1f} times as long "
        "as the plain kernel in a double backward, and a tenth of the memory",
    )
    by_hand = sama["PyTorch by hand"] / darts["PyTorch by hand"]
    assert by_hand == pytest.approx(sama["metaopt"] / darts["metaopt"], abs=0.05)
    attention = grown("attention", 2048)
    assert attention["metaopt"] == pytest.approx(
        attention["PyTorch, its plain kernel"] / 10, rel=0.1
    )
    for comparison in ("meta-weight-net", "regression-darts", "regression-neumann"):
        assert 0.85 < medians(comparison)["Betty"] / medians(comparison)["metaopt"] < 1


def test_the_price_of_less_memory() -> None:
    says("README.md", "memory runs out; a third more time")
    for comparison in ("transformer", "lstm"):
        found = medians(comparison)
        assert 1.3 < found['metaopt, memory="steps"'] / found["metaopt"] < 1.45


# Written by evaluate.py


def test_the_tables_of_what_carries_over() -> None:
    import judging

    found = figures("carrying-over.json")
    assert judging.markdown(found, judging.OF_GET_STARTED) in page("docs/pages/get-started.md")
    assert judging.markdown(found, None) in page(LEARNED)
    assert judging.specialists(found) in page(LEARNED)


def test_the_scores_of_what_carries_over() -> None:
    summary = figures("carrying-over.json")["summary"]
    rows = {
        row[0]: row[1:] for row in rows_of(LEARNED, "Losses of a contender over those of tuned")
    }
    for title, name in {
        "small": "small",
        "seed 1": "small, seed 1",
        "seed 2": "small, seed 2",
        "Adam with a cosine": "Adam, cosine",
        "Nesterov with a cosine": "Nesterov, cosine",
        "Muon (Adam for vectors) with a cosine": "Muon, cosine",
    }.items():
        for place, by in enumerate(("mean", "final")):
            at, low, high = (short(value, 3) for value in summary[name][f"{by}, interquartile"])
            assert rows[title][place] == f"{at} ({low} to {high})"
        for place, other in ((2, "Adam"), (3, "Adam, cosine")):
            scores = [summary[name][f"against each, {by}"][other] for by in ("mean", "final")]
            if rows[title][place]:
                assert rows[title][place] == ", ".join("-".join(map(str, one)) for one in scores)
    mean, final = (
        "-".join(map(str, summary["small"][f"against each, {by}"]["Muon, cosine"]))
        for by in ("mean", "final")
    )
    says(LEARNED, f"small has {mean} in the mean and {final} in the end")


def test_the_card_of_the_small_optimizer() -> None:
    card = tomllib.loads(page("optimizers/trained/small.toml"))
    summary = figures("carrying-over.json")["summary"]["small"]
    for by in ("mean", "final"):
        at, low, high = (short(value, 3) for value in summary[f"{by}, interquartile"])
        assert f"{at} ({low} to {high})" in card["results"]
    weights = load_file(ROOT / "optimizers/trained/small.safetensors")
    assert sum(one.numel() for one in weights.values()) == 289
    assert round(int(card["cost"].split(" s ")[0]) / 60) == 7
    says(
        "docs/pages/get-started.md", "has 289 numbers, was trained on small MLPs for seven minutes"
    )


# Written by data_attribution.py


@pytest.mark.parametrize("kind", ["digits", "language"])
def test_the_tables_of_the_attribution(kind: str) -> None:
    from attribution_report import Judged, write_table

    methods = figures("attribution.json")[kind]["methods"]
    judged = {name: Judged(torch.empty(0), found) for name, found in methods.items()}
    assert write_table(judged) in page(SCORES)


def test_the_attribution_in_the_readme() -> None:
    methods = figures("attribution.json")["digits"]["methods"]
    names, _, scores = rows_of("README.md", "| exact metagradient")[:3]
    assert scores == [short(methods[name]["score"], 2) for name in names]
    assert max(scores) == scores[0]


def test_the_attribution_in_words() -> None:
    methods = figures("attribution.json")["digits"]["methods"]
    exact, cg = methods["exact metagradient"], methods["CG"]
    low, high = (short(end, 3) for end in exact["interval"])
    little = short(cg["settings"]["damping 0.0001"], 2)
    says(RESULTS, f"datamodeling score {short(exact['score'], 3)} ({low} to {high})")
    says(SCORES, f"CG with little damping, which solves the system best, has {little}")


# Written by train_schedule.py and compare_inner_rates.py


def test_the_table_of_learned_schedules() -> None:
    found = figures("schedules.json")
    together = found["adam, final loss, 100 steps: gp lstm mlp attention policy"]
    alone = found["adam, final loss, 100 steps: attention"]
    rows = {row[0]: row[1:] for row in rows_of(SCHEDULES, "## On digits")}
    kinds = {
        "`MLPSchedule`": ("mlp", together),
        "`GPSchedule`": ("gp", together),
        "`PolicySchedule`, by `Reinforce`": ("policy", together),
        "`LSTMSchedule`": ("lstm", together),
        "`AttentionSchedule`": ("attention", together),
        "the same, outer rate .004": ("attention", alone),
    }
    for title, (kind, entry) in kinds.items():
        test = {one["name"]: one for one in entry["test"]}[f"learned: {kind}"]
        loss, change, z, seconds = rows[title]
        assert loss == short(test["final"], 4)
        assert change == f"{100 * (test['final ratio'] - 1):+.1f} %"
        assert z == f"{test['final z']:.1f}"
        assert seconds == f"{entry['training CPU seconds'][f'learned: {kind}']:.0f}"
    for title, name in (("best cosine", "cosine"), ("best constant of 3 (.06)", "constant")):
        (test,) = (one for one in together["test"] if one["name"].startswith(name))
        assert rows[title][0] == short(test["final"], 4)
    (deeper,) = (one for one in together["transfer"] if one["name"].startswith("learned: mlp"))
    says(
        SCHEDULES,
        f"its final loss is {short(deeper['final'], 4)}, {100 * (1 - deeper['final ratio']):.1f} % "
        f"below the best of the nine cosines there (z {deeper['final z']:.1f})",
    )


def test_the_table_of_schedules_in_maml_and_reptile() -> None:
    found = figures("schedules.json")
    shown = rows_of(SCHEDULES, "## In MAML and Reptile")[2:]
    entries = [
        *found["maml, 10 shots, 5 steps, seeds 10 to 17"]["rows"].items(),
        *found["maml, 10 shots, 5 steps, seeds 0 to 9"]["rows"].items(),
        *found["reptile, 10 shots, 5 steps, seeds 0 to 9"]["rows"].items(),
    ]
    constant: list[float] = []
    for (_, title, error, difference, better), (name, entry) in zip(shown, entries, strict=True):
        assert error == f"{short(entry['error'], 3)} ± {short(entry['±'], 3)}"
        if name.startswith("constant"):
            constant = entry["seeds"]
            assert title.startswith(f"constant, {short(float(name.split(', ')[1]), 3).rstrip('0')}")
            continue
        gap = re.sub(r"0\.", ".", f"{entry['difference']:+.3f} ± {entry['± difference']:.3f}")
        assert difference == gap
        wins = sum(one < other for one, other in zip(entry["seeds"], constant, strict=True))
        assert better == f"{wins} of {len(constant)}"


# Written by meta_weight_net.py text


def test_the_table_of_damaged_texts() -> None:
    from meta_weight_net import percent

    found = figures("text-noise.json")
    columns = ("plain", "balanced", "clean only", "finite differences", "SAMA", "oracle")
    tail = "--noise 0.0 --imbalance 10.0"
    places = [
        *(("--flip positive", "tuned"), ("--flip positive", "long"), ("defaults", "tuned")),
        *(("defaults", "long"), ("--noise 0.3", "tuned"), ("--noise 0.2", "tuned")),
        *((tail, "tuned"), (tail, "long")),
    ]
    shown = rows_of(LABELS, "## Texts")[2 : 2 + len(places)]
    for (_, _, *cells), (options, length) in zip(shown, places, strict=True):
        # it does not see the labels that are damaged, and was trained once
        methods = {"clean only": found["--flip positive"]["clean only"]} | found[options]
        plain = torch.tensor(methods["plain"][length], dtype=torch.float64)
        for method, cell in zip(columns, cells, strict=True):
            if method not in methods:
                assert not cell
                continue
            accuracy = torch.tensor(methods[method][length], dtype=torch.float64)
            is_far = "*" in percent(accuracy - plain, signed=True)
            assert cell.endswith(" *") == is_far, (options, method)
            mean, error = map(float, cell.removesuffix(" *").split(" ± "))
            half = 0.05 + 1e-6  # some means lie halfway between two numbers of the page
            assert mean == pytest.approx(100 * accuracy.mean().item(), abs=half)
            deviation = 100 * accuracy.std().item()
            assert error == pytest.approx(deviation / len(accuracy) ** 0.5, abs=half)


def test_damaged_texts_in_words() -> None:
    from meta_weight_net import percent

    found = figures("text-noise.json")
    accuracy = {
        (options, method): torch.tensor(entry["tuned"], dtype=torch.float64)
        for options, methods in found.items()
        for method, entry in methods.items()
    }
    layers = "--flip positive --layers 1 --learning-rates 0.0003 --lengths 50 100"
    layers += " --batch-size 16 --clean-batch 32"
    half = "--flip positive --learning-rates 0.001 --precision bf16"
    tail = "--noise 0.0 --imbalance 10.0"

    def gap(options: str, one: str, other: str) -> str:
        return percent(accuracy[options, one] - accuracy[options, other])

    flip, learned = "--flip positive", "finite differences"
    clean = accuracy[flip, "clean only"]
    says(
        LABELS,
        f"beats plain training by {gap(flip, learned, 'plain')} points, with either rule. "
        f"The clean examples alone it beats by {gap(flip, learned, 'clean only')}",
        f"it is worse by {gap('defaults', 'plain', learned)} "
        f"(SAMA {gap('defaults', 'plain', 'SAMA')})",
        f"Finite differences beat plain training by {gap(layers, learned, 'plain')} points, "
        f"SAMA by {gap(layers, 'SAMA', 'plain')}; the clean examples alone they beat by "
        f"{gap(layers, learned, 'clean only')} and {gap(layers, 'SAMA', 'clean only')}",
        f"Finite differences beat plain training by {gap(tail, learned, 'plain')} points and the "
        f"clean examples alone by {percent(accuracy[tail, learned] - clean)}",
        f"{percent(accuracy[half, 'plain'])} plain and {percent(accuracy[half, learned])} by "
        "finite differences at the tuned length",
    )
    assert gap(flip, learned, "plain") == gap(flip, "SAMA", "plain")


def test_the_times_of_texts() -> None:
    found = figures("text-noise.json")
    layers = "--flip positive --layers 1 --learning-rates {} --lengths 50 100 --batch-size 16 "
    layers += "--clean-batch 32"
    adapters = layers.replace("--layers 1", "--layers 1 --lora")

    def cost(options: str, method: str, digits: int = 0) -> str:
        return f"{1000 * found[options][method]['CPU seconds a step']:.{digits}f}"

    flip, last = "--flip positive", layers.format("0.0003")
    half, lora = f"{last} --precision bf16 --seeds 3", f"{adapters.format('0.001')} --seeds 3"
    says(
        LABELS,
        f"takes {cost(flip, 'plain', 1)} ms plain, {cost(flip, 'finite differences', 1)} ms by "
        f"finite differences and {cost(flip, 'SAMA', 1)} ms by SAMA",
        f"A step takes {cost(last, 'plain')} ms plain, {cost(last, 'finite differences')} ms by "
        f"finite differences and {cost(last, 'SAMA')} ms by SAMA",
        f"a step takes {cost(half, 'plain')} ms plain and {cost(half, 'finite differences')} ms by "
        f"finite differences, where float32 takes {cost(last, 'plain')} and "
        f"{cost(last, 'finite differences')} ms",
        f"at {cost(lora, 'plain')} and {cost(lora, 'finite differences')} ms a step",
    )


# Written by record_results.py


NUMBER = re.compile(r"(?<![\w.,])(\d*)\.(\d+)(?!\w|\.\d)")


EXAMPLES = {path.stem for path in (ROOT / "examples").glob("[!_]*.py")}
# program -> what its row in the table of scripts begins with
SCRIPTS = {
    "digits-deep": ("the same weights on a network they never saw",),
    "quadratics": ("LSTM on random quadratics", "the same weights in other dimensions"),
    "train_schedule": ("learned schedule",),
    "maml": ("MAML, sinusoids",),
    "omniglot": ("MAML, Omniglot",),
}


def test_the_demo_prints_the_table_of_the_page() -> None:
    printed = figures("programs.json")["demo"]["printed"]
    start = next(place for place, line in enumerate(printed) if line.startswith("optimizer "))
    table = "\n".join(line.rstrip() for line in printed[start : start + 7])
    assert table in page(RESULTS), table


def test_the_figures_of_the_examples() -> None:
    """Each decimal of a row is in what the program printed, as a number or in per cent."""
    found = figures("programs.json")
    rows = [row for row in rows_of(RESULTS, "## Examples") if row[0].startswith("`examples/")]
    assert {Path(row[0].strip("`")).stem for row in rows} == EXAMPLES
    for title, _, measured in rows:
        name = Path(title.strip("`")).stem
        # with other data too
        printed = [found[one]["printed"] for one in found if one.split("-")[0] == name]
        check_printed([line for lines in printed for line in lines], measured)


def test_the_figures_of_the_scripts() -> None:
    found = figures("programs.json")
    rows = {row[0]: row[2] for row in rows_of(RESULTS, "\n## Scripts") if len(row) == 3}
    for name, titles in SCRIPTS.items():
        for title in titles:
            check_printed(found[name]["printed"], rows[title])


def test_the_table_of_meta_weight_net_on_digits() -> None:
    found = figures("programs.json")
    rows = {row[0]: row[1:] for row in rows_of(LABELS, "## Digits")}
    for name, options in (
        ("meta_weight_net", "(40 % wrong labels)"),
        ("meta_weight_net-60", "`--noise 0.6`"),
        ("meta_weight_net-tail", "`--noise 0 --imbalance 50`"),
        ("meta_weight_net-class", '`--noise 0 --imbalance 50 --weight-input "loss and class"`'),
        ("meta_weight_net", "40 %, 3200 steps, rate .03 / .1 (plain memorises)"),
        ("meta_weight_net-60", "60 %, 3200 steps, rate .01 / .03 / .1"),
    ):
        check_printed(found[name]["printed"], " ".join(rows[options]))


def test_the_recorded_commands_are_those_of_the_script() -> None:
    """With the same options; their order does not matter."""
    from record_results import NAMES, PROGRAMS

    found = figures("programs.json")
    assert found.keys() == PROGRAMS.keys()
    for name, commands in PROGRAMS.items():
        recorded = [sorted(shlex.split(command)) for command in found[name]["commands"]]
        current = [sorted(shlex.split(command.format(**NAMES))) for command in commands]
        assert recorded == current, name


def test_the_table_of_the_language_model() -> None:
    printed = figures("programs.json")["language_model"]["printed"]
    start = [place for place, line in enumerate(printed) if " sources, " in line][-1]  # all seeds
    rows = [row for row in rows_of(LANGUAGE, "| | 40 sources") if row[0][:1].isalpha()]
    assert len(rows) == 4
    for name, *cells in rows:
        check_printed(
            [line for line in printed[start:] if line.startswith(f"| {name} ")], str(cells)
        )


MLP = ("whole-0", "whole-1", "windows-0", "windows-1", "windows-2", "", "1", "2")
LSTM = ("", "10", "5", "20", "20-unbounded", "5-constant", "20-constant")


@pytest.mark.parametrize(
    ("heading", "programs"),
    [
        ("## What the MLP needs", [f"mlp-{name}" if name else "demo" for name in MLP]),
        ("## What the LSTM needs", [f"lstm-{name}".rstrip("-") for name in LSTM]),
    ],
)
def test_the_tables_of_recipes(heading: str, programs: list[str]) -> None:
    """Seconds and validation of each training, and its learned optimizer in the test."""
    found = figures("programs.json")
    rows = rows_of(LEARNED, heading)[2 : 2 + len(programs)]
    for row, name in zip(rows, programs, strict=True):
        lines = [
            line for line in found[name]["printed"] if line.startswith(("Trained", "learned:"))
        ]
        seconds, *cells = row[-3:]
        assert f"Trained for {seconds} s of CPU time" in lines[0], name
        check_printed(lines[:2], " ".join(cells))


@pytest.mark.parametrize(
    ("start", "program", "count"), [("| | median", "branin", 5), ("| | 20 trials", "search", 4)]
)
def test_the_tables_of_searches(start: str, program: str, count: int) -> None:
    printed = figures("programs.json")[program]["printed"]
    for row in rows_of("docs/pages/guides/black-box.md", start)[2 : 2 + count]:
        backend = row[0].split("`")[1].removesuffix("Search").lower()
        check_printed(
            [line for line in printed if line.startswith(f"{backend} ")], " ".join(row[1:])
        )


def test_the_rougher_attribution() -> None:
    printed = figures("programs.json")["attribution-rough"]["printed"]
    table = "\n".join(line for line in printed if line.startswith("| "))
    assert table in page(SCORES)


def test_what_pages_show_as_printed() -> None:
    from record_results import show_printed

    pages = [*(ROOT / "docs/pages").rglob("*.md")]
    shown = [one for one in pages if "<!-- printed: " in one.read_text()]
    assert shown
    for one in shown:
        text = one.read_text()
        assert {*re.findall(r"<!-- printed: (.+?) -->", text)} <= figures("programs.json").keys()
        assert text == show_printed(text), one


def check_printed(lines: list[str], text: str) -> None:
    """Assert that each decimal of the text is among the numbers, as it is or in per cent."""
    numbers = re.findall(r"\d*\.\d+(?:e-?\d+)?|\d+", "\n".join(lines))
    printed = [scale * float(number) for number in numbers for scale in (1, 100)]
    for whole, digits in NUMBER.findall(text):
        close = 0.5000001 * 10 ** -len(digits)
        assert any(abs(one - float(f"{whole}.{digits}")) <= close for one in printed), (
            f"{whole}.{digits}",
            text,
        )


def test_the_figures_of_the_gallery() -> None:
    """Those of the examples: what a program prints, or results.md says of it."""
    found = figures("programs.json")
    sections = page("docs/pages/gallery.md").split("\n### ")
    results = page(RESULTS).splitlines()
    for name in EXAMPLES:
        (section,) = (part for part in sections if f"gallery/{name}.png" in part)
        said = [line for line in results if line.startswith(f"| `examples/{name}.py`")]
        text = section.split("```")[0].split(".png)")[1]
        check_printed([*found[name]["printed"], *said], re.sub(r"\([^)]*\.md[^)]*\)", "", text))


# The picture of the front page


def test_the_picture_is_drawn_from_the_files() -> None:
    from draw_results import PICTURE, draw

    assert page(PICTURE) == draw(), "Run `python scripts/draw_results.py`."
    assert len(page(PICTURE)) < 60_000


def test_the_history_is_drawn_from_its_file() -> None:
    from bench_history import read
    from draw_history import PICTURE, draw

    lines = read(ROOT / "benchmarks" / "history.jsonl")
    assert page(PICTURE) == draw(lines), "Run `python scripts/draw_history.py`."
    assert page(PICTURE).count("<circle") > 10
