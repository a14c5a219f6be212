"""Small graphs of every shape, against one definition.

A level's gradient is that of its loss now, as a function of its parameters since its last step,
through all steps that the levels below it have made since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import random_level_graphs
import torch
from level_problems import level
from torch import Tensor

import metaopt as mo

NAMES = ("top", "a", "b", "c")
LR = 0.1
pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own forward mode uses it
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),
]


def loss(name: str, reads: list[str], value: Callable[[str], Tensor]) -> Tensor:
    w = value(name)
    total = (w - 0.3).square() / 2 + 0.2 * torch.sin(2 * w)
    for other in reads:
        k = 1 + 0.3 * NAMES.index(other)
        v = k * value(other)
        total = (
            total + 0.6 * torch.sin(v + w) + 0.3 * (w - v).square() + 0.2 * torch.tanh(v).square()
        )
    return total


def build(
    reads: dict[str, list[str]], edges: list[tuple[str, str, int]], start: dict[str, Tensor]
) -> mo.LevelGraph:
    levels = {
        name: level(
            name,
            start[name],
            lambda s, _, name=name: loss(name, reads[name], lambda other: getattr(s, other)()),
            LR,
            allow_unused=True,
        )
        for name in NAMES
    }
    return mo.LevelGraph(
        [mo.Edge(levels[upper], levels[lower], steps=steps) for upper, lower, steps in edges]
    )


def timeline(order: Any, owner: str | None = None) -> Iterator[str]:
    """Yield the level of every single step, in order: what runs inside a step comes before it."""
    for event in order.events.get(owner, ()):
        for _ in range(event.steps):
            yield from timeline(order, event.level)
            yield event.level


def slope(
    name: str,
    past: list[tuple[str, dict[str, Tensor]]],
    now: dict[str, Tensor],
    reads: Any,
    below: Any,
) -> Tensor:
    """Return dT/dw of a level, given every step so far and what stood before it."""
    last = max((i for i, (other, _) in enumerate(past) if other == name), default=-1)
    w = now[name].clone() if now[name].requires_grad else now[name].clone().requires_grad_()
    again, moved = past[: last + 1], {}
    for other, before in past[last + 1 :]:
        here = {**before, **moved, name: w}
        if other in below[name]:
            moved[other] = here[other] - LR * slope(other, again, here, reads, below)
        again = [*again, (other, here)]
    there = {**now, **moved, name: w}
    value = loss(name, reads[name], there.__getitem__)
    return torch.autograd.grad(value, w, create_graph=True)[0]


def by_hand(order: Any, reads: Any, now: dict[str, Tensor], steps: int) -> dict[str, Tensor]:
    past: list[tuple[str, dict[str, Tensor]]] = []
    for name in [*timeline(order)] * steps:
        after = now[name] - LR * slope(name, past, now, reads, order.below).detach()
        past.append((name, now))
        now = {**now, name: after}
    return now


READS = {  # the levels that top, a, b and c read
    "as it was found": ("", "c", "c", "top a b"),
    "that is read through another": ("", "b", "a c", "top b"),
    "and the top reads it": ("c", "b", "a c", "top b"),
    "and all read all": ("a b c", "top b c", "top a c", "top a b"),
}


@pytest.mark.parametrize("kind", READS)
def test_a_level_that_steps_twice_while_one_it_shares_has_not_moved(kind: str) -> None:
    """`a` makes its second step when `b` has moved, but not `c`: a KeyError."""
    reads = {name: read.split() for name, read in zip(NAMES, READS[kind], strict=True)}
    start = {name: torch.tensor(0.5 - 0.3 * i) for i, name in enumerate(NAMES)}
    edges = [("top", "a", 2), ("top", "b", 2), ("top", "c", 2), ("a", "b", 1), ("b", "c", 1)]
    graph = build(reads, edges, start)
    assert "c b c a b a" in " ".join(timeline(graph.plan.timetable))
    for _ in range(2):
        graph.step()
    for name, value in by_hand(graph.plan.timetable, reads, start, 2).items():
        torch.testing.assert_close(
            graph.params(name)["value"], value, rtol=1e-13, atol=1e-14, msg=name
        )


@pytest.mark.parametrize("seed", range(30))
def test_a_random_graph_equals_its_simulation(seed: int) -> None:
    """Rules, starts, shared and nested levels, several batches a step, warm-up, and more.

    There are virtual steps, and averages in buffers.
    """
    random_level_graphs.compare(seed, steps=2)
