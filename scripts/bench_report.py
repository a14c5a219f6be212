"""What `bench.py` found, as files and as tables."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tabulate import tabulate

import metaopt

PACKAGES = ("torch", "higher", "torchopt", "jax", "betty-ml")
BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


@dataclass(frozen=True)
class Times:
    """A side's times in seconds: of building and the first run, and of each repetition."""

    name: str
    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Memory:
    """A side's memory in bytes for a number of steps; an estimate has no peak and no time.

    Attributes:
        grown: by which a run raised the largest resident size.
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
    found = {
        "comparison": comparison,
        "kind": kind,
        "threads": threads,
        "problem": {"about": type(problem).__doc__, **asdict(problem)},
        "versions": _versions(),
        "machine": _machine(),
        "rows": [asdict(row) for row in rows],
    }
    (out / f"{comparison}-{kind}-{threads}.json").write_text(json.dumps(found, indent=1) + "\n")


def tables(out: Path) -> str:
    """Return all tables that `out` has rows for, as Markdown."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    parts = []
    for table in found:
        threads = f"{table['threads']} thread{'s' if table['threads'] > 1 else ''}"
        sizes = ", ".join(
            f"{name} {value}" for name, value in table["problem"].items() if name != "about"
        )
        build = _times if table["kind"] == "times" else _memory
        head = f"**{table['comparison']}**, {threads}. {table['problem']['about']} ({sizes})"
        parts.append(f"{head}\n\n{build(table['rows'])}")
    numbers: dict[str, set[str]] = {}
    for name, number in [pair for table in found for pair in table["versions"].items()]:
        numbers.setdefault(name, set()).add(number)
    with_these = ", ".join(
        f"{name} {' and '.join(sorted(of_it))}" for name, of_it in numbers.items()
    )
    machines = " and ".join(sorted({table["machine"] for table in found}))
    return "\n\n".join([*parts, f"Measured with {with_these} on {machines}."])


def readme_with(readme: str, text: str) -> str:
    """Return the README with `text` between its two markers.

    Raises:
        ValueError: the markers are not there.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(
            f"The README has no place for the tables. Put `{BEGIN}` and `{END}` where they belong."
        )
    return f"{before}{begin}\n{text}\n{end}{after}"


def _times(rows: list[dict[str, Any]]) -> str:
    sides = [Times(**row) for row in rows]
    cells = [
        [
            side.name,
            _duration(side.median),
            f"{_duration(min(side.seconds))} to {_duration(max(side.seconds))}",
            f"{sides[0].median / side.median:.3g}",
            _duration(side.first),
        ]
        for side in sides
    ]
    headers = ["side", "median", "range", f"times as fast as {sides[0].name}", "first run"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _memory(rows: list[dict[str, Any]]) -> str:
    points = [Memory(**row) for row in rows]
    lengths = sorted({point.steps for point in points})
    cells = []
    for name in dict.fromkeys(point.name for point in points):
        own = {point.steps: point for point in points if point.name == name}
        measured = [point for point in own.values() if point.peak is not None]
        per_step = (
            ""
            if len(measured) < 2
            else _size(
                (measured[-1].grown - measured[-2].grown)
                / (measured[-1].steps - measured[-2].steps)
            )
        )
        cells.append([name, *(_point(own.get(steps)) for steps in lengths), per_step])
    headers = ["side", *(f"{steps} steps" for steps in lengths), "each further step"]
    return tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True)


def _point(point: Memory | None) -> str:
    if point is None:
        return ""
    if point.seconds is None:
        return f"(would be {_size(point.grown)})"
    return f"{_size(point.grown)}, {_duration(point.seconds)}"


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def _size(count: float) -> str:
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


def _machine() -> str:
    """Return the processor's name and Python's version."""
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{names[0] if names else platform.machine()}, Python {platform.python_version()}"
