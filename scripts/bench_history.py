"""What became of `bench.py`'s figures from run to run, and the ratios that other pages show.

`benchmarks/history.jsonl` has one line for each table that was ever published: the newest line of a
comparison is what `docs/pages/benchmarks.md` shows.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, NamedTuple

Result = dict[str, Any]  # what `bench_report.write` writes, read back
Line = dict[str, Any]  # what `summarize` makes of it


def summarize(result: Result) -> Line:
    """Return what the history keeps of a result: who was measured with what, and the figures.

    Of times: the median of each side in seconds, and how many times as fast as the first side it
    is. Of memory: bytes and seconds of each side by number of steps, and how many times less than
    the first side it needs.
    """
    about = {
        key: result[key]
        for key in ("comparison", "kind", "threads", "commit", "date", "versions", "machine")
    }
    figures = _times(result["rows"]) if result["kind"] == "times" else _memory(result["rows"])
    return about | figures


def record(path: Path, results: list[Result]) -> list[Line]:
    """Append a line for each result that the file does not have yet, and return all its lines."""
    lines = read(path)
    new = [line for line in map(summarize, results) if line not in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in new)
    return lines + new


def read(path: Path) -> list[Line]:
    """Return the lines of the history, oldest first; none if there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def latest(lines: list[Line], comparison: str, kind: str, threads: int = 1) -> Line:
    """Return the newest line of a comparison.

    Raises:
        ValueError: there is none.
    """
    for line in reversed(lines):
        if (line["comparison"], line["kind"], line["threads"]) == (comparison, kind, threads):
            return line
    raise ValueError(
        f"benchmarks/history.jsonl must have a line of {comparison!r}, {kind}, {threads} thread, "
        f"got none. Run `python scripts/bench.py {comparison} --write`."
    )


class Headline(NamedTuple):
    """A column of the README's table: ours beside a peer."""

    about: str
    comparison: str
    peer: str
    beside: str | None = None
    """another side, whose ratio to the peer is told too"""


SPEED = [
    Headline("MAML on sine waves", "sinusoid", "higher", beside="JAX jit"),
    Headline("meta-weight-net", "meta-weight-net", "Betty"),
]
MEMORY = Headline("{steps} steps of a transformer", "transformer", "higher")
OURS, COMPILED, REVOLVED = "metaopt", "metaopt, compiled", "metaopt, Revolve(16)"


def headlines(lines: list[Line]) -> str:
    """Return the README's table: one row of ratios of what was measured in one run."""
    heads, cells = [""], ["times as fast"]
    for about, comparison, peer, beside in SPEED:
        medians = latest(lines, comparison, "times")["medians"]
        eager, compiled = (medians[peer] / medians[name] for name in (OURS, COMPILED))
        heads.append(f"{about}, beside {peer}")
        other = f" ({beside}: {medians[peer] / medians[beside]:.2g})" if beside else ""
        cells.append(f"{eager:.2g}, compiled {compiled:.2g}{other}")
    memory = latest(lines, MEMORY.comparison, "memory")["memory"]
    ours, theirs = memory[REVOLVED], memory[MEMORY.peer]
    # the longest loop that both have run; what was only estimated has no time
    steps = max((n for n in ours if n in theirs and ours[n][1] and theirs[n][1]), key=int)
    (own_bytes, own_seconds), (their_bytes, their_seconds) = ours[steps], theirs[steps]
    heads.append(f"{MEMORY.about.format(steps=steps)}, beside {MEMORY.peer}")
    size = their_bytes / own_bytes
    cells.append(f"{their_seconds / own_seconds:.2g}, in 1/{size:.2g} of the memory")
    return _table([heads, cells])


STEPS = {
    "26 thousand parameters": "optimizer-steps-26k",
    "269 thousand": "optimizer-steps-269k",
    "5.0 million": "optimizer-steps-5m",
}


def step_costs(lines: list[Line]) -> str:
    """Return the guide's table: what a step of a learned optimizer costs, in steps of Adam."""
    columns = [latest(lines, comparison, "times")["medians"] for comparison in STEPS.values()]
    adam, *learned = columns[0]
    rows = [["", *STEPS], [f"`{adam}`", *(f"{1e3 * medians[adam]:.2g} ms" for medians in columns)]]
    for name in learned:
        ratios = [medians[name] / medians[adam] for medians in columns]
        rows.append([f"`{name}`", *(f"{ratio:.{0 if ratio > 9.95 else 1}f}" for ratio in ratios)])
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    """Return Markdown; the first row has the heads."""
    heads, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *others))


def _times(rows: list[dict[str, Any]]) -> dict[str, Any]:
    medians = {row["name"]: statistics.median(row["seconds"]) for row in rows}
    first = medians[rows[0]["name"]]
    return {
        "medians": {name: _rounded(median) for name, median in medians.items()},
        "ratios": {name: _rounded(first / median) for name, median in medians.items()},
    }


def _memory(rows: list[dict[str, Any]]) -> dict[str, Any]:
    found: dict[str, dict[str, list[float | None]]] = {}
    for row in rows:
        seconds = None if row["seconds"] is None else _rounded(row["seconds"])
        found.setdefault(row["name"], {})[str(row["steps"])] = [row["grown"], seconds]
    first = found[rows[0]["name"]]
    ratios = {
        name: {
            steps: _rounded(first[steps][0] / grown)
            for steps, (grown, _) in points.items()
            if steps in first
        }
        for name, points in found.items()
    }
    return {"memory": found, "ratios": ratios}


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
