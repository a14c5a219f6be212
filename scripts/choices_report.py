"""What `compare_choices.py` found, as a file and as tables."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_report import between, describe_machine, size
from tabulate import tabulate
from torch import __version__ as torch_version

ROOT = Path(__file__).parents[1]
PAGES = {
    "rules": "docs/pages/choose/rule.md",
    "starts": "docs/pages/choose/rule.md",
    "memory": "docs/pages/choose/memory.md",
    "estimators": "docs/pages/choose/estimator.md",
}


def write(out: Path, part: str, found: dict[str, Any], config: Any, commit: str) -> None:
    """Write one part's figures, and what they were measured with, into `out`."""
    options = {
        name: value for name, value in asdict(config).items() if name not in ("out", "publish")
    }
    entry = {
        "options": options,
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch_version,
        "machine": describe_machine(),
        "found": found,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{part}.json").write_text(json.dumps(entry, indent=1) + "\n")


def read(out: Path) -> dict[str, Any]:
    """Return the figures in `out`, by part."""
    return {
        part: json.loads((out / f"{part}.json").read_text())
        for part in PAGES
        if (out / f"{part}.json").exists()
    }


def publish(figures: dict[str, Any], root: Path = ROOT) -> None:
    """Put figures into benchmarks/choices.json beside those of other parts, and into the pages.

    Raises:
        ValueError: a page has no markers for its table.
    """
    path = root / "benchmarks" / "choices.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known.update(figures)
    path.write_text(json.dumps(known, indent=1) + "\n")
    for part in figures:
        page = root / PAGES[part]
        page.write_text(between(page.read_text(), part, tables(part, known)))


def tables(part: str, figures: dict[str, Any]) -> str:
    """Return a part's tables as Markdown, with what they were measured with."""
    entry = figures[part]
    text = {"rules": _rules, "starts": _starts, "memory": _memory, "estimators": _estimators}[part](
        entry["found"], entry["options"]
    )
    return (
        f"{text}\n\nMeasured on {entry['date']}, at commit {entry['commit']}, with torch "
        f"{entry['torch']} on one thread of {entry['machine']}."
    )


def _rules(found: dict[str, Any], options: dict[str, Any]) -> str:
    parts = []
    for kind, one in found.items():
        headers = ["rule", "near a solution: cosine", "error", "early: cosine", "error"]
        headers += ["time", "memory"]
        rows = [
            [_code(name), *_pair(row["late"]), *_pair(row["early"]), *_costs(row, one["rows"])]
            for name, row in one["rows"].items()
        ]
        parts.append(f"**{one['numbers']} {kind}**\n\n{_write(headers, rows)}")
    return "\n\n".join(parts)


def _starts(found: dict[str, Any], options: dict[str, Any]) -> str:
    rows = [[_code(name), *_pair(row["early"]), *_costs(row, found)] for name, row in found.items()]
    return _write(["rule", "cosine", "error", "time", "memory"], rows)


def _memory(found: dict[str, Any], options: dict[str, Any]) -> str:
    rows = [
        [_code(name), _small(row["error"]), *_costs(row, found), size(row["bytes"])]
        for name, row in found.items()
    ]
    return _write(["rule", "error", "time", "memory", "memory at most"], rows)


def _estimators(found: dict[str, Any], options: dict[str, Any]) -> str:
    parts = []
    headers = ["estimator", "size", "cosine", "noise", "time", "time for its noise", "memory"]
    for kind, one in found.items():
        rows = [
            [
                _code(name),
                f"{row['size']:.2f} ± {row['size error']:.2f}",
                f"{row['cosine']:.2f}",
                f"{row['noise']:.2g}",
                f"{1e3 * row['seconds']:.2g} ms",
                f"{1e3 * row['seconds to the gradient']:.2g} ms",
                size(row["bytes"]),
            ]
            for name, row in one["rows"].items()
        ]
        numbers = f"{one['numbers']} numbers"
        parts.append(f"**{kind[0].upper()}{kind[1:]}**, {numbers}\n\n{_write(headers, rows)}")
    return "\n\n".join(parts)


def _code(name: str) -> str:
    """Return what one writes as code that a narrow column does not break."""
    return f"<nobr><code>{name}</code></nobr>"


def _pair(row: dict[str, float] | None) -> list[str]:
    if row is None:
        return ["refused", ""]
    return [f"{row['cosine']:.3f}", _small(row["error"])]


def _small(error: float) -> str:
    """Return an error for reading; what is rounding alone counts as 0."""
    return "0" if error < 1e-10 else f"{error:.2g}"


def _costs(row: dict[str, float], rows: dict[str, dict[str, float]]) -> list[str]:
    """Return time and memory over those of the first row."""
    first = next(iter(rows.values()))
    return [f"{row[key] / first[key]:.2g}" for key in ("seconds", "bytes")]


def _write(headers: list[str], rows: list[list[str]]) -> str:
    text: str = tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)
    return text
