"""A graph as a picture."""

from __future__ import annotations

from pathlib import Path

from metaopt.extras import extra
from metaopt.levels.program import Program
from metaopt.levels.text import counted


def draw(program: Program, path: str | Path) -> None:
    """Write a picture: levels as boxes, upper ones higher, and edges with their rules."""
    with extra("`LevelGraph.draw`"):
        import matplotlib
        from matplotlib.figure import Figure

    rows = _rows(program)
    place = {
        name: ((i + 0.5) / len(names), -depth)
        for depth, names in enumerate(rows)
        for i, name in enumerate(names)
    }
    width = max(len(names) for names in rows)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.2 + 2.6 * width, 0.8 + 1.5 * len(rows)))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 1), ylim=(0.6 - len(rows), 0.4))
        axes.axis("off")
        for edge in program.edges:
            (x0, y0), (x1, y1) = place[edge.upper.name], place[edge.lower.name]
            axes.annotate(
                "",
                (x1, y1 + 0.12),
                (x0, y0 - 0.12),
                arrowprops={"arrowstyle": "-|>", "color": "black"},
            )
            text = f"{type(edge.differentiate).__name__}, {counted(edge.steps, 'step')}"
            text += "" if edge.start == "continue" else f", {edge.start}"
            axes.text(
                (x0 + x1) / 2,
                (y0 + y1) / 2,
                text,
                ha="center",
                va="center",
                backgroundcolor="white",
                fontsize=8,
            )
        for name, (x, y) in place.items():
            level = program.levels[name]
            size = sum(param.numel() for param in level.net.params.values())
            text = f"{name}\n{counted(size, 'parameter')}, {type(level.optimizer).__name__}"
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.5", "facecolor": "#e8eef7"},
            )
        figure.savefig(path, dpi=150)


def _rows(program: Program) -> list[list[str]]:
    """Return the levels by depth: the longest way down from a top level."""
    depth: dict[str, int] = {}
    for name in program.order.levels:
        depth[name] = max((depth[edge.upper.name] + 1 for edge in program.above(name)), default=0)
    return [
        [name for name in depth if depth[name] == row] for row in range(max(depth.values()) + 1)
    ]
