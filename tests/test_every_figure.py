"""No decimal stands on a page without a source.

Each page with decimals names the files of benchmarks/, and of programs.json perhaps the programs,
that they come from. A decimal that none of them has, as it is or in per cent, fails, and so does a
page that names nothing. `test_figures.py` says which figure belongs where; this test finds those
that were forgotten. It does not see whole numbers and signs, and where a source has many numbers, a
wrong one may be among them.
"""

from __future__ import annotations

import itertools
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NUMBER = re.compile(r"(?<![\w.,])(\d*)\.(\d+)(?!\w|\.\d)")
PRINTED = re.compile(r"\d*\.\d+(?:e[+-]?\d+)?|\d+")

EXAMPLES = " ".join(
    ["programs.json:", *sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))]
)
# page -> files of benchmarks/, with recorded programs perhaps, and numbers that nobody measured:
# versions, settings, other people's figures
SOURCES: dict[str, tuple[str, ...]] = {
    "README.md": ("attribution.json", "2.0"),
    "docs/pages/benchmarks.md": ("history.jsonl", "22.7"),
    "docs/pages/choose/memory.md": ("history.jsonl", "2.5 3.5"),  # Griewank, Walther 2000
    "docs/pages/gallery.md": (
        *("attribution.json", "carrying-over.json", "choices.json", "history.jsonl"),
        *("schedules.json", f"{EXAMPLES} demo language_model maml meta_weight_net"),
    ),
    "docs/pages/get-started.md": ("2.13 3.11",),
    "docs/pages/guides/black-box.md": ("programs.json: branin search search-5",),
    "docs/pages/guides/language-models.md": (
        *("attribution.json", "history.jsonl", "text-noise.json", "22.7"),
    ),
    "docs/pages/guides/many-processes.md": ("programs.json: scaling", "1.5 2.13 2.6 22.4"),
    "docs/pages/migrate/higher.md": ("0.028 1.3 1.55 2.13 3.5 3.11",),
    "docs/pages/migrate/learn2learn.md": ("3.3 3.11",),
    "docs/pages/migrate/learned-optimization.md": ("0.1 0.5",),
    "docs/pages/results/index.md": (
        *("attribution.json", "carrying-over.json", "schedules.json", "2.13"),
        f"{EXAMPLES} demo digits-deep domains-amazon domains-tweets maml omniglot quadratics "
        "train_schedule",
    ),
    "docs/pages/results/attribution.md": (
        *("attribution.json", "programs.json: attribution attribution-rough attribution-language"),
    ),
    "docs/pages/results/language-model.md": (
        "programs.json: language_model language_model-long",
        "0.33 1.2",
    ),
    "docs/pages/results/learned-optimizers.md": (
        "carrying-over.json",
        "programs.json: demo digits-deep lstm lstm-5 lstm-5-constant lstm-10 lstm-20 "
        "lstm-20-constant lstm-20-unbounded mlp-1 mlp-2 mlp-whole-0 mlp-whole-1 mlp-windows-0 "
        "mlp-windows-1 mlp-windows-2 quadratics stress",
    ),
    "docs/pages/results/noisy-labels.md": (
        "programs.json: meta_weight_net meta_weight_net-60 meta_weight_net-class "
        "meta_weight_net-tail texts texts-both texts-history texts-history-and-class texts-loss "
        "texts-loss-and-class",
        *("text-noise.json", "22.7 1.9"),
    ),
    "docs/pages/results/schedules.md": ("schedules.json",),
    "docs/pages/torch-versions.md": ("2.13 2.14 2.15 5.5",),
    "docs/pages/tutorials/maml.md": ("programs.json: omniglot",),
    "docs/pages/tutorials/meta-gradients.md": ("0.1 0.7",),
    "docs/pages/tutorials/three-levels.md": ("0.001 0.02 0.2",),
}


def prose(text: str) -> str:
    """Return a page without tables that scripts write, code and addresses."""
    for pattern in (
        r"<!-- (.+?) -->.*?<!-- /\1 -->",
        r"^( *)```.*?^\1```",
        r"^ {4}\S.*?$",
        r"`[^`\n]*`",
        r"\]\([^)]*\)|arXiv:[\d.]+|doi:\S+",
    ):
        text = re.sub(pattern, "", text, flags=re.DOTALL | re.MULTILINE)
    return text


def numbers(found: Any) -> Iterator[float]:
    """Yield every number of a file, also those in lines of text."""
    if isinstance(found, dict):
        for one in found.values():
            yield from numbers(one)
    elif isinstance(found, list):
        for one in found:
            yield from numbers(one)
    elif isinstance(found, str):
        yield from map(float, PRINTED.findall(found))
    elif isinstance(found, int | float):
        yield abs(float(found))


def of_programs(names: str) -> Iterator[float]:
    """Yield what recorded programs printed, without their options."""
    programs = json.loads((ROOT / "benchmarks/programs.json").read_text())
    for name in names.split():
        yield from numbers([line for line in programs[name]["printed"] if " = " not in line])


def of_benchmarks() -> Iterator[float]:
    """Yield times and sizes of the newest tables, and ratios to ours and of ours in a table."""
    lines = map(json.loads, (ROOT / "benchmarks/history.jsonl").read_text().splitlines())
    newest = {(one["comparison"], one["kind"], one["threads"]): one for one in lines}
    for line in newest.values():
        times = line.get("medians", {})
        yield from (1000 * one for one in times.values())
        yield from ratios(times)
        by_steps: dict[str, dict[str, list[float | None]]] = {}
        for side, points in line.get("memory", {}).items():
            for steps, point in points.items():
                by_steps.setdefault(steps, {})[side] = point
        for sides in by_steps.values():
            for place in (0, 1):  # bytes, seconds
                known = {name: point[place] for name, point in sides.items() if point[place]}
                yield from (one / 2**30 for one in known.values())
                yield from ratios(known)


def ratios(sides: dict[str, float]) -> Iterator[float]:
    for one, other in itertools.permutations(sides, 2):
        if "metaopt" in (one, other) or one.startswith("metaopt, compiled"):
            yield sides[one] / sides[other]


def of_texts() -> Iterator[float]:
    """Yield means and standard errors of accuracies and of their paired differences, and times."""
    found = json.loads((ROOT / "benchmarks/text-noise.json").read_text())
    clean = found["--flip positive"]["clean only"]  # trained once, for all
    for methods in found.values():
        seen = {"clean only": clean} | methods
        for length in ("tuned", "long"):
            rows = [method[length] for method in seen.values()]
            pairs = itertools.permutations(rows, 2)
            gaps = [[a - b for a, b in zip(*pair, strict=False)] for pair in pairs]
            for row in rows + gaps:
                yield 100 * abs(statistics.fmean(row))
                yield 100 * statistics.stdev(row) / len(row) ** 0.5
        yield from (1000 * method["CPU seconds a step"] for method in seen.values())


def pool(source: str) -> Iterator[float]:
    """Yield the numbers of a source, as they are and in per cent; a ratio also as a gain."""
    file, _, names = source.partition(": ")
    if file == "programs.json":
        found = of_programs(names)
    elif file == "history.jsonl":
        found = of_benchmarks()
    elif file == "text-noise.json":
        found = of_texts()
    elif file.endswith(".json"):
        found = numbers(json.loads((ROOT / "benchmarks" / file).read_text()))
    else:
        found = map(float, source.split())  # numbers that were chosen
    for one in found:
        yield from (one, 100 * one)
        if file == "schedules.json":
            yield 100 * abs(1 - one)


def missing(text: str, sources: tuple[str, ...]) -> list[str]:
    """Return the decimals of a page that are in none of its sources, each with its line."""
    known = [one for source in sources for one in pool(source)]
    return [
        f"{whole}.{digits} in: {line}"
        for line in prose(text).splitlines()
        for whole, digits in NUMBER.findall(line)
        if not any(
            abs(one - float(f"{whole}.{digits}")) <= 0.5000001 * 10 ** -len(digits) for one in known
        )
    ]


PAGES = [
    "README.md",
    *sorted(
        str(page.relative_to(ROOT))
        for page in (ROOT / "docs/pages").rglob("*.md")
        if "api" not in page.parts
    ),
]


@pytest.mark.parametrize("page", PAGES)
def test_every_decimal_has_a_source(page: str) -> None:
    assert not missing((ROOT / page).read_text(), SOURCES.get(page, ()))


def test_what_has_no_source_is_found() -> None:
    line = "It is 123.457 times as fast, of `0.5` and [0.25](there/0.75), and 1.75."
    found = missing(line, ("schedules.json", "0.25"))
    assert [one.split(" in: ")[0] for one in found] == ["123.457", "1.75"]


def test_sources_are_of_pages() -> None:
    assert SOURCES.keys() <= {*PAGES}
