"""A graph as text, and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from metaopt.extras import extra
from metaopt.levels.plan import Plan
from metaopt.levels.timetable import Owner


def describe_graph(plan: Plan, values: Mapping[str, float | Tensor]) -> str:
    """Return the levels, the edges with their rules, and what happens in one step, as text.

    Args:
        plan: what the graph is.
        values: "level/name" -> the present value of a hyperparameter; those that are tensors are
            shown, the others are constants.
    """
    lines = [
        f"LevelGraph with {write_count(len(plan.levels), 'level')} and "
        f"{write_count(len(plan.edges), 'edge')}",
        "levels",
    ]
    width = max(map(len, plan.levels))
    for name in plan.timetable.levels:
        level = plan.levels[name]
        size = sum(param.numel() for param in level.net.params.values())
        options = [
            f"{key}={value}"
            for key in ("copies", "accumulate", "warmup")
            if (value := getattr(level, key)) not in (None, 0, 1)
        ]
        options += [
            f"{key.removeprefix(f'{name}/')} is now {float(value):.4g}"
            for key, value in values.items()
            if key.startswith(f"{name}/") and isinstance(value, Tensor) and value.numel() == 1
        ]
        lines.append(
            f"  {name:{width}}  {write_count(size, 'parameter')}, "
            f"{', '.join([_one_line(level.optimizer), *options])}"
        )
    lines.append("edges")
    for edge in plan.edges:
        extra = ", look_ahead" if edge.look_ahead else ""
        extra += "" if isinstance(edge.look_ahead, bool) else f" with {_one_line(edge.look_ahead)}"
        ends = f"{edge.upper.name} -> {edge.lower.name}"
        lines.append(
            f"  {ends}: {write_count(edge.steps, 'step')}, start={edge.start}, "
            f"{edge.differentiate}{extra}"
        )
    return "\n".join([*lines, "one step", *_describe_turn(plan, None, 1)])


def _describe_turn(plan: Plan, owner: Owner, depth: int) -> Iterator[str]:
    for event in plan.timetable.events[owner]:
        name = event.level
        inside = name in plan.timetable.members
        steps = "each step" if inside and event.steps > 1 else "which"
        yield f"{'  ' * depth}{name} makes {write_count(event.steps, 'step')}" + (
            f", {steps} waits for" if inside else ""
        )
        if inside:
            yield from _describe_turn(plan, name, depth + 1)


def draw(plan: Plan, path: str | Path) -> None:
    """Write a picture: levels as boxes, upper ones higher, and edges with their rules."""
    with extra("`LevelGraph.draw`"):
        import matplotlib
        from matplotlib.figure import Figure

    rows = _arrange(plan)
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
        for edge in plan.edges:
            (x0, y0), (x1, y1) = place[edge.upper.name], place[edge.lower.name]
            axes.annotate(
                "",
                (x1, y1 + 0.12),
                (x0, y0 - 0.12),
                arrowprops={"arrowstyle": "-|>", "color": "black"},
            )
            text = f"{type(edge.differentiate).__name__}, {write_count(edge.steps, 'step')}"
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
            level = plan.levels[name]
            size = sum(param.numel() for param in level.net.params.values())
            text = f"{name}\n{write_count(size, 'parameter')}, {type(level.optimizer).__name__}"
            axes.text(
                x,
                y,
                text,
                ha="center",
                va="center",
                bbox={"boxstyle": "round,pad=0.5", "facecolor": "#e8eef7"},
            )
        figure.savefig(path, dpi=150)


def _arrange(plan: Plan) -> list[list[str]]:
    """Return the levels by depth: the longest way down from a top level."""
    depth: dict[str, int] = {}
    for name in plan.timetable.levels:
        depth[name] = max((depth[edge.upper.name] + 1 for edge in plan.above[name]), default=0)
    return [
        [name for name in depth if depth[name] == row] for row in range(max(depth.values()) + 1)
    ]


def write_count(number: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _one_line(module: object) -> str:
    return " ".join(str(module).split())
