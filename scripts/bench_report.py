"""What `bench.py` found, as files and as tables."""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench_history import Line, headlines, latest, record, step_costs, summarize
from draw_history import PICTURE, draw
from tabulate import tabulate

import metaopt

PACKAGES = ("torch", "higher", "torchopt", "jax", "betty-ml")
ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"^\*\*([\w-]+)\*\*, (\d+) threads?\. .*\n\n((?:\|.*\n)+)", re.MULTILINE)


@dataclass(frozen=True)
class Times:
    """A side's times in seconds: of building and the first run, and of each repetition.

    Attributes:
        error: of its gradient, of the exact one's norm; None where that is not known.
    """

    name: str
    first: float
    seconds: list[float]
    error: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Memory:
    """A side's memory in bytes for a number of steps; an estimate has no peak and no time.

    Attributes:
        steps: or tokens, of a problem that has those.
        grown: by which a run, and building before it, raised the largest resident size.
        peak: the largest resident size, libraries included.
        seconds: of the run, and of building before it.
    """

    name: str
    steps: int
    grown: int
    peak: int | None
    seconds: float | None


def write(
    out: Path, comparison: str, threads: int, problem: Any, rows: Sequence[Times] | Sequence[Memory]
) -> None:
    """Write one table's rows, and what they were measured with, into `out`."""
    kind = type(rows[0]).__name__.lower()
    sizes = asdict(problem)
    if hasattr(problem, "inner_steps"):
        sizes["inner steps"] = problem.inner_steps
    found = {
        "comparison": comparison,
        "kind": kind,
        "threads": threads,
        "commit": find_commit(),
        "date": datetime.now(UTC).date().isoformat(),
        "problem": {"about": " ".join(str(type(problem).__doc__).split()), **sizes},
        "versions": _versions(),
        "machine": describe_machine(),
        "rows": [asdict(row) for row in rows],
    }
    (out / f"{comparison}-{kind}-{threads}.json").write_text(json.dumps(found, indent=1) + "\n")


def read(out: Path) -> list[dict[str, Any]]:
    """Return the results in `out`, by comparison."""
    return [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]


def publish(results: list[dict[str, Any]], root: Path = ROOT) -> None:
    """Publish results: tables, a line for each in the history, and the ratios on other pages.

    They go to `docs/pages/benchmarks.md`, where other tables stay, `benchmarks/history.jsonl`,
    `README.md` and the guide to learned optimizers; the picture of the history is drawn anew.

    Raises:
        ValueError: the markers are not there, or a comparison that these pages show was never
            recorded.
    """
    lines = record(root / "benchmarks" / "history.jsonl", results)
    benchmarks = "docs/pages/benchmarks.md"
    for name, marker, text in (
        (benchmarks, "bench", merge((root / benchmarks).read_text(), results, lines)),
        ("README.md", "ratios", headlines(lines)),
        ("docs/pages/guides/learned-optimizers.md", "optimizer steps", step_costs(lines)),
    ):
        (root / name).write_text(between((root / name).read_text(), marker, text))
    (root / PICTURE).parent.mkdir(parents=True, exist_ok=True)
    (root / PICTURE).write_text(draw(lines))


def tables(results: list[dict[str, Any]]) -> str:
    """Return all results as Markdown."""
    return "\n\n".join([*map(_table, results), _measured(results)])


def merge(page: str, results: list[dict[str, Any]], lines: list[Line]) -> str:
    """Return the tables of a page where these results take the places of older ones.

    The history says below them when and with what each was measured.
    """
    found = {
        (old[1], "times" if "| median " in old[3] else "memory", int(old[2])): old[0].strip()
        for old in TABLE.finditer(page)
    }
    newest = {key: latest(lines, *key) for key in found.keys() | {*map(_key, results)}}
    for result in results:
        if summarize(result) == newest[_key(result)]:  # an older run may have left others
            found[_key(result)] = _table(result)
    shown = sorted(found)
    return "\n\n".join([*(found[key] for key in shown), _measured([newest[key] for key in shown])])


def _key(result: dict[str, Any]) -> tuple[str, str, int]:
    return result["comparison"], result["kind"], result["threads"]


def between(page: str, marker: str, text: str) -> str:
    """Return the page with `text` between `<!-- marker -->` and `<!-- /marker -->`.

    Raises:
        ValueError: the markers are not there.
    """
    begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(
            f"The page has no place for the tables. Put `{begin}` and `{end}` where they belong."
        )
    return f"{before}{begin}\n{text}\n{end}{after}"


def _table(result: dict[str, Any]) -> str:
    """Return one result as Markdown, in the form of `TABLE`."""
    threads = f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}"
    sizes = ", ".join(
        f"{name} {value}" for name, value in result["problem"].items() if name != "about"
    )
    head = f"**{result['comparison']}**, {threads}. {result['problem']['about']} ({sizes})"
    steps = result["problem"].get("inner steps")
    is_times = result["kind"] == "times"
    unit = "token" if "tokens" in result["problem"] else "step"
    rows = _times(result["rows"], steps) if is_times else _memory(result["rows"], unit)
    return f"{head}\n\n{rows}"


def _measured(results: Sequence[dict[str, Any]]) -> str:
    """Return when and with what results, or lines of the history, were measured."""
    found: dict[str, dict[str, list[str]]] = {}
    for result in results:
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
        runs = found.setdefault(f"{versions} on {result['machine']}", {})
        when = f"{result['date']}, at commit {result['commit']}"
        runs.setdefault(when, []).append(result["comparison"])
    return "\n\n".join(
        "\n".join(
            [f"Measured with {setup}:\n"]
            + [f"- {when}: {', '.join(dict.fromkeys(names))}" for when, names in runs.items()]
        )
        for setup, runs in found.items()
    )


def _times(rows: list[dict[str, Any]], inner_steps: int | None) -> str:
    sides = [Times(**row) for row in rows]
    cells = [
        [
            side.name,
            duration(side.median),
            f"{duration(min(side.seconds))} to {duration(max(side.seconds))}",
            f"{sides[0].median / side.median:.3g}",
            duration(side.first),
        ]
        for side in sides
    ]
    headers = ["side", "median", "range", f"times as fast as {sides[0].name}", "first run"]
    if inner_steps:
        headers.append("inner steps a second")
        for row, side in zip(cells, sides, strict=True):
            row.append(f"{inner_steps / side.median:,.0f}")
    if any(side.error is not None for side in sides):
        headers.append("error")
        for row, side in zip(cells, sides, strict=True):
            row.append("" if side.error is None else f"{side.error:.2g}")
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _memory(rows: list[dict[str, Any]], unit: str) -> str:
    points = [Memory(**row) for row in rows]
    lengths = sorted({point.steps for point in points})
    cells = []
    for name in dict.fromkeys(point.name for point in points):
        own = {point.steps: point for point in points if point.name == name}
        measured = [point for point in own.values() if point.peak is not None]
        per_step = (
            ""
            if len(measured) < 2
            else size(
                (measured[-1].grown - measured[-2].grown)
                / (measured[-1].steps - measured[-2].steps)
            )
        )
        cells.append([name, *(_point(own.get(steps)) for steps in lengths), per_step])
    headers = ["side", *(f"{steps} {unit}s" for steps in lengths), f"each further {unit}"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _point(point: Memory | None) -> str:
    if point is None:
        return ""
    if point.seconds is None:
        return f"(would be {size(point.grown)})"
    return f"{size(point.grown)}, {duration(point.seconds)}"


def duration(seconds: float) -> str:
    """Return a time for reading: three digits."""
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def size(count: float) -> str:
    """Return a number of bytes for reading: three digits."""
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def _versions() -> dict[str, str]:
    # what is imported, which need not be what is installed
    found = {"metaopt": getattr(metaopt, "__version__", None) or version("metaopt")}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def find_commit() -> str:
    """Return the commit of the source that runs, with "-dirty" if it was changed since."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"  # no checkout: an unpacked archive


def describe_machine() -> str:
    """Return the processor's name and Python's version."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, Python {platform.python_version()}"
