"""A graph as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from metaopt.levels.order import Owner
from metaopt.levels.program import Program


def describe(program: Program, values: Mapping[str, float | Tensor]) -> str:
    """Return the levels, the edges with their rules, and what happens in one step, as lines of
    text.

    Args:
        program: what the graph is.
        values: "level/name" -> the present value of a hyperparameter; those that are tensors are
            shown, the others are constants.
    """
    lines = [
        f"LevelGraph with {counted(len(program.levels), 'level')} and "
        f"{counted(len(program.edges), 'edge')}",
        "levels",
    ]
    width = max(map(len, program.levels))
    for name in program.order.levels:
        level = program.levels[name]
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
            f"  {name:{width}}  {counted(size, 'parameter')}, "
            f"{', '.join([_one_line(level.optimizer), *options])}"
        )
    lines.append("edges")
    for edge in program.edges:
        extra = ", look_ahead" if edge.look_ahead else ""
        extra += "" if isinstance(edge.look_ahead, bool) else f" with {_one_line(edge.look_ahead)}"
        ends = f"{edge.upper.name} -> {edge.lower.name}"
        lines.append(
            f"  {ends}: {counted(edge.steps, 'step')}, start={edge.start}, "
            f"{edge.differentiate}{extra}"
        )
    return "\n".join([*lines, "one step", *_turn(program, None, 1)])


def _turn(program: Program, owner: Owner, depth: int) -> Iterator[str]:
    for event in program.order.events[owner]:
        name = event.level
        inside = name in program.order.members
        steps = "each step" if inside and event.steps > 1 else "which"
        yield f"{'  ' * depth}{name} makes {counted(event.steps, 'step')}" + (
            f", {steps} waits for" if inside else ""
        )
        if inside:
            yield from _turn(program, name, depth + 1)


def counted(number: int, what: str) -> str:
    """Return a number with its noun."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _one_line(module: object) -> str:
    return " ".join(str(module).split())
