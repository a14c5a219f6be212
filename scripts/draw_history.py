"""Draw how ours compares with its peers from run to run, docs/pages/pictures/history.svg.

Usage: python scripts/draw_history.py

A row for each comparison in benchmarks/history.jsonl that was timed more than once; a dot for each
time it was, the newest in blue: how many times as fast ours is as the first side of its table.
"""

from __future__ import annotations

import math
from pathlib import Path

from bench_history import OURS as SIDE
from bench_history import Line, read
from svg import GREY, OURS, TEXT, dot, line, picture, text, title

ROOT = Path(__file__).parents[1]
PICTURE = "docs/pages/pictures/history.svg"
WIDTH, LEFT, RIGHT, TOP, ROW = 720, 250, 690, 66, 26
ENDS = 0.5, 16.0


def draw(lines: list[Line]) -> str:
    """Return the picture as SVG."""
    runs = find_runs(lines)
    bottom = TOP + ROW * len(runs)
    parts = title(10, "From run to run", "times as fast as the peer; blue is the newest run")
    ratio = ENDS[0]
    while ratio <= ENDS[1]:
        x = across(ratio)
        parts.append(line([(x, TOP), (x, bottom)], GREY, 1 if ratio == 1 else 0.3))
        parts.append(text(x, bottom + 18, f"{ratio:g}", "middle"))
        ratio *= 2
    for place, ((comparison, peer), ratios) in enumerate(runs.items()):
        y = TOP + (place + 0.5) * ROW
        parts.append(text(LEFT - 12, y + 4, f"{comparison}, beside {peer.split(',')[0]}", "end"))
        parts.append(line([(across(one), y) for one in ratios], TEXT, 0.6))
        colours = [*[GREY] * (len(ratios) - 1), OURS]
        pairs = zip(ratios, colours, strict=True)
        parts += [dot(across(one), y, colour, 5) for one, colour in pairs]
    return picture(WIDTH, bottom + 34, parts)


def across(ratio: float) -> float:
    """Return where a ratio stands; those beyond the ends stand there."""
    inside = min(max(ratio, ENDS[0]), ENDS[1])
    part = math.log(inside / ENDS[0]) / math.log(ENDS[1] / ENDS[0])
    return LEFT + part * (RIGHT - LEFT)


def find_runs(lines: list[Line]) -> dict[tuple[str, str], list[float]]:
    """Return (comparison, peer) -> ratios, oldest first, of what was timed more than once."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in lines:
        if one["kind"] == "times" and one["threads"] == 1 and SIDE in one["ratios"]:
            peer = next(iter(one["ratios"]))
            found.setdefault((one["comparison"], peer), []).append(one["ratios"][SIDE])
    return {key: found[key] for key in sorted(found) if len(found[key]) > 1}


if __name__ == "__main__":
    lines = read(ROOT / "benchmarks" / "history.jsonl")
    (ROOT / PICTURE).write_text(draw(lines))
