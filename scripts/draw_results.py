"""Draw three results side by side, docs/pages/pictures/results.svg, from the files in benchmarks/.

Usage: python scripts/draw_results.py

Memory of a meta-gradient over the number of inner steps; how well scores of training examples
foretell retraining; losses of a learned optimizer on networks it never saw. The picture has no
background, and colours that can be read on a light page and on a dark one.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from bench_history import latest, read
from svg import GREY, OURS, TEXT, bar, dot, line, picture, text, title

ROOT = Path(__file__).parents[1]
PICTURE = "docs/pages/pictures/results.svg"
WIDTH, HEIGHT = 930, 300
TOP, BOTTOM = 62, 254  # of the panels' axes
MEMORY = {
    "higher": ("higher", GREY),
    'metaopt, memory="steps"': ('memory="steps"', OURS),
    "metaopt, Revolve(16)": ("Revolve(16)", OURS),
}
OPTIMIZERS = {"Muon, cosine": ("Muon, cosine", GREY), "small": ("learned, 289 weights", OURS)}


def draw(root: Path = ROOT) -> str:
    """Return the picture as SVG."""
    lines = read(root / "benchmarks" / "history.jsonl")
    attribution = json.loads((root / "benchmarks" / "attribution.json").read_text())
    families = json.loads((root / "benchmarks" / "carrying-over.json").read_text())["families"]
    parts = [
        *draw_memory(latest(lines, "transformer", "memory")["memory"], 50, 235),
        *draw_scores(attribution["digits"]["methods"], 440, 602),
        *draw_families(families, 742, 915),
    ]
    return picture(WIDTH, HEIGHT, parts)


def draw_memory(memory: dict[str, dict[str, list[float]]], left: int, right: int) -> list[str]:
    """Draw MiB over the number of inner steps, both in logarithms."""
    lengths = sorted(map(int, memory["higher"]))
    low, high = math.log(2**26), math.log(2**33)

    def across(steps: int) -> float:
        part = math.log(steps / lengths[0]) / math.log(lengths[-1] / lengths[0])
        return left + part * (right - left)

    def height(size: float) -> float:
        return BOTTOM - (math.log(size) - low) / (high - low) * (BOTTOM - TOP)

    parts = title(
        left - 42, "Memory of a meta-gradient", "by number of inner steps of a transformer"
    )
    for exponent, label in ((26, "64 MiB"), (28, "256"), (30, "1 GiB"), (32, "4")):
        parts.append(line([(left, height(2**exponent)), (right, height(2**exponent))], GREY, 0.3))
        parts.append(text(left - 6, height(2**exponent) + 4, label, "end"))
    parts += [text(across(steps), BOTTOM + 18, str(steps), "middle") for steps in lengths]
    for name, (label, colour) in MEMORY.items():
        points = [(across(steps), height(memory[name][str(steps)][0])) for steps in lengths]
        parts.append(line(points, colour, 1, 2.5))
        parts += [dot(x, y, colour) for x, y in points]
        x, y = points[-1]
        parts.append(text(x + 8, y + 4, label, "start", colour))
    return parts


def draw_scores(methods: dict[str, dict[str, Any]], left: int, right: int) -> list[str]:
    """Draw each method's linear datamodeling score with its interval, the exact one first."""
    names = sorted(methods, key=lambda name: -methods[name]["score"])
    subtitle = "rank correlation with retraining, 95 % intervals"
    parts = title(left - 100, "Which examples made a prediction?", subtitle)
    row = (BOTTOM - TOP) / len(names)
    for place, name in enumerate(names):
        y, score = TOP + (place + 0.5) * row, methods[name]["score"]
        colour = OURS if name == "exact metagradient" else GREY
        start, end = (left + at * (right - left) for at in methods[name]["interval"])
        parts.append(text(left - 6, y + 4, name.removesuffix(" metagradient"), "end"))
        parts.append(bar(left, y - row * 0.32, score * (right - left), row * 0.64, colour))
        parts.append(line([(start, y), (end, y)], TEXT, 1, 1.5))
        parts.append(text(end + 5, y + 4, f"{score:.2f}".lstrip("0"), "start"))
    return parts


def draw_families(
    families: dict[str, dict[str, dict[str, dict[str, float]]]], left: int, right: int
) -> list[str]:
    """Draw each family's mean losses over those of Adam with the best constant rate."""
    ends = 0.25, 1.75
    parts = title(
        left - 90, "A learned optimizer, new networks", "mean loss over that of tuned Adam"
    )
    row = (BOTTOM - TOP) / len(families)

    def across(ratio: float) -> float:
        return left + (ratio - ends[0]) / (ends[1] - ends[0]) * (right - left)

    for ratio in (0.5, 1, 1.5):
        parts.append(
            line([(across(ratio), TOP), (across(ratio), BOTTOM)], GREY, 1 if ratio == 1 else 0.3)
        )
        parts.append(text(across(ratio), BOTTOM + 18, f"{ratio:g}", "middle"))
    for place, (family, outcomes) in enumerate(families.items()):
        y = TOP + (place + 0.5) * row
        adam = outcomes["Adam"]["mean"]["mean"]
        parts.append(text(left - 6, y + 4, family, "end"))
        for name, (_, colour) in OPTIMIZERS.items():
            parts.append(dot(across(outcomes[name]["mean"]["mean"] / adam), y, colour, 5))
    x = left - 84
    for label, colour in reversed(OPTIMIZERS.values()):
        parts += [dot(x, BOTTOM + 36, colour, 5), text(x + 9, BOTTOM + 40, label, "start")]
        x += 142
    return parts


if __name__ == "__main__":
    (ROOT / PICTURE).write_text(draw())
