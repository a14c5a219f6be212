"""No decimal stands on a page without a source.

Each page with decimals names the files of benchmarks/, and of programs.json perhaps the programs,
that they come from. A decimal that none of them has, as it is or in per cent, fails, and so does a
page that names nothing. `test_figures.py` says which figure belongs where; this test finds those
that were forgotten.
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
NUMBER = re.compile(r"(?<![\w.])(\d*)\.(\d+)(?![\w.])")
PRINTED = re.compile(r"\d*\.\d+(?:e[+-]?\d+)?|\d+")

# page -> files of benchmarks/, with recorded programs perhaps, and numbers that nobody measured:
# versions, settings, other people's figures
SOURCES: dict[str, tuple[str, ...]] = {
    "README.md": ("attribution.json",),
    "docs/pages/benchmarks.md": ("history.jsonl", "22.7"),
    "docs/pages/choose/memory.md": ("history.jsonl", "2.5 3.5"),  # Griewank, Walther 2000
    "docs/pages/gallery.md": (
        *("attribution.json", "carrying-over.json", "choices.json", "history.jsonl"),
        *("programs.json", "schedules.json"),
    ),
    "docs/pages/get-started.md": ("2.13 3.11",),
    "docs/pages/guides/black-box.md": ("programs.json: branin search search-5",),
    "docs/pages/guides/language-models.md": (
        *("attribution.json", "history.jsonl", "text-noise.json", "22.7"),
    ),
    "docs/pages/guides/many-processes.md": ("programs.json: scaling", "1.5 2.13 2.6 22.4"),
    "docs/pages/migrate/higher.md": ("1.3 2.13 3.5 3.11", "1.55"),
    "docs/pages/migrate/learn2learn.md": ("3.3",),
    "docs/pages/migrate/learned-optimization.md": ("0.1 0.5",),
    "docs/pages/results/index.md": (
        *("attribution.json", "carrying-over.json", "programs.json", "schedules.json", "2.13"),
    ),
    "docs/pages/results/attribution.md": (
        *("attribution.json", "programs.json: attribution attribution-rough attribution-language"),
    ),
    "docs/pages/results/language-model.md": ("programs.json: language_model language_model-long",),
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
    """Yield what recorded programs printed, and what they took; of all of them without names."""
    programs = json.loads((ROOT / "benchmarks/programs.json").read_text())
    for name in names.split() or programs:
        yield from numbers([programs[name]["printed"], programs[name]["commands"]])


def of_benchmarks() -> Iterator[float]:
    """Yield times and sizes of the newest tables, and their ratios within a table."""
    lines = map(json.loads, (ROOT / "benchmarks/history.jsonl").read_text().splitlines())
    newest = {(one["comparison"], one["kind"], one["threads"]): one for one in lines}
    for line in newest.values():
        times = [*line.get("medians", {}).values()]
        yield from (1000 * one for one in times)
        yield from (one / other for one, other in itertools.permutations(times, 2))
        by_steps: dict[str, list[list[float | None]]] = {}
        for points in line.get("memory", {}).values():
            for steps, point in points.items():
                by_steps.setdefault(steps, []).append(point)
        for points in by_steps.values():
            for these in zip(*points, strict=True):
                known = [one for one in these if one]
                yield from (one / 2**30 for one in known)
                yield from (one / other for one, other in itertools.permutations(known, 2))


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
    """Yield the numbers of a source: as they are, in per cent, and what is missing to 100 %."""
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
        yield from (one, 100 * one, 100 * abs(1 - one))


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
    line = "It is 123.457 times as fast, of `0.5` and [0.25](there/0.75)."
    assert missing(line, ("schedules.json", "0.25")) == [
        "123.457 in: It is 123.457 times as fast, of  and [0.25."
    ]
