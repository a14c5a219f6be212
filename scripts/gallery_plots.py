"""What the pictures of `draw_gallery.py` have in common: their style, bars, and their size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaopt.extras import extra

with extra("scripts/draw_gallery.py"):
    import matplotlib
    from matplotlib.figure import Figure
    from PIL import Image

OURS, OTHER, THIRD = "#1f5fa8", "#a3a9b0", "#c8442c"
MOST_BYTES = 40_000  # of a file

# An opaque white card is as readable on a dark page as on a light one.
STYLE = {
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "savefig.dpi": 130,
}
NUMBER = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+)(?:e[-+]?\d+)?")


def read_row(text: str, name: str) -> list[float]:
    """Return the numbers after a name at the beginning of a line.

    Raises:
        ValueError: no line begins with it.
    """
    found = re.search(rf"^[ |]*{re.escape(name)}(?=[ :|,])(.*)$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"a line must begin with {name!r}, got {text[-500:]!r}")
    return [float(number) for number in NUMBER.findall(found[1])]


def make_figure(height: float, columns: int = 1, width: float = 5.6) -> tuple[Figure, Any]:
    """Return a figure and its axes; sizes are in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns)


def draw_bars(
    axes: Any,
    values: dict[str, float],
    ours: Sequence[str],
    *,
    form: str = "{:.1f}",
    errors: Sequence[float] | None = None,
) -> None:
    """Draw a horizontal bar with its value for each name, from the top down."""
    names, labels = [*values], [form.format(value) for value in values.values()]
    places = range(len(names), 0, -1)
    colours = [OURS if name in ours else OTHER for name in names]
    axes.barh(places, values.values(), color=colours, height=0.62, xerr=errors, capsize=3)
    axes.set_yticks(places, names)
    ends = map(sum, zip(values.values(), errors or [0.0] * len(names)))
    for place, end, label in zip(places, ends, labels):
        axes.annotate(label, (end, place), (4, 0), textcoords="offset points", va="center")
    axes.margins(x=max(0.14, 0.035 * max(map(len, labels))))  # the longest must not be cut


def draw_dots(
    axes: Any,
    values: dict[str, float],
    ours: Sequence[str],
    *,
    form: str = "{:.1f}",
    errors: Sequence[float] | None = None,
) -> None:
    """Draw a dot with its value for each name, where an axis from 0 would hide the differences."""
    names = [*values]
    places = range(len(names), 0, -1)
    for place, name, error in zip(places, names, errors or [0.0] * len(names)):
        colour = OURS if name in ours else OTHER
        axes.errorbar(values[name], place, xerr=error or None, fmt="o", color=colour, capsize=3)
        at, label = (values[name], place), form.format(values[name])
        axes.annotate(label, at, (0, 6), textcoords="offset points", ha="center")
    axes.set_yticks(places, names)
    axes.set_ylim(0.5, len(names) + 0.7)
    axes.margins(x=0.12)
    axes.grid(axis="x", alpha=0.3)


def draw_points(axes: Any, groups: dict[str, Sequence[float]], ours: Sequence[str]) -> None:
    """Draw a row of points for each name, one for each seed, and a tick at their mean."""
    names = [*groups]
    for place, name in zip(range(len(names), 0, -1), names):
        colour = OURS if name in ours else OTHER
        axes.plot(groups[name], [place] * len(groups[name]), "o", color=colour, alpha=0.75)
        mean = sum(groups[name]) / len(groups[name])
        axes.plot([mean], [place], "|", color=colour, markersize=20, markeredgewidth=2)
    axes.set_yticks(range(len(names), 0, -1), names)
    axes.set_ylim(0.4, len(names) + 0.6)
    axes.grid(axis="x", alpha=0.3)


def save(picture: Figure | Path, path: Path) -> None:
    """Write a figure, or a picture that a run left, as a small PNG.

    Raises:
        ValueError: the file would have more than `MOST_BYTES`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, Figure):
        picture.savefig(path)
        picture = path
    with Image.open(picture) as image:
        pixels = image.convert("RGB")
    for widest, colours in ((1000, 64), (800, 64), (640, 64), (640, 32)):
        shown = pixels
        if pixels.width > widest:
            shown = pixels.resize((widest, round(pixels.height * widest / pixels.width)))
        shown.quantize(colours).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            return
    raise ValueError(f"{path} must have at most {MOST_BYTES} bytes, got {path.stat().st_size}.")


def use_style() -> None:
    """Make all figures of this process look alike."""
    matplotlib.rcParams.update(STYLE)
