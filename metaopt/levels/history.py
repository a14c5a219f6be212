"""What happened to levels that several others share, since one of these last stepped.

A level that shares levels does not own their steps, so its loss has to see these once more as
functions of its parameters: see `forward.replay`. A rule above may differentiate such a level, so
all that is here is explicit tensors: a tree that can be an input of an inner loop.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from metaopt._functional import Params
from metaopt.differentiate import Inputs
from metaopt.levels.plan import Plan
from metaopt.levels.scope import Rows, Scene
from metaopt.levels.state import State, States


class Record(NamedTuple):
    """Steps that a level made, and what running them again takes.

    Attributes:
        level: its name.
        steps: number of steps.
        begins: whether it began anew, where its edge says so.
        scene: what it read.
        rows: its batches.
        after: its state afterwards.
    """

    level: str
    steps: int
    begins: bool
    scene: Scene
    rows: Rows
    after: State


class Window(NamedTuple):
    """The part of a history that a level's next step depends on.

    Attributes:
        start: the states of the levels that it shares, before the records.
        records: theirs, in order.
        old: how many leading records the level saw in its last step; shared levels that share
            others need them.
    """

    start: States
    records: tuple[Record, ...]
    old: int


NO_WINDOW = Window({}, (), 0)


def make_inputs(
    scene: Scene, window: Window, batch: Rows | None, optimizer: Params | None = None
) -> Inputs:
    """Return what the steps of a level read, as an inner loop has it.

    Args:
        scene: the levels that it reads.
        window: what happened to those that it shares. A rule differentiates only what it is given,
            so these are explicit tensors too.
        batch: batches that are the same at every step; None where each step has its own.
        optimizer: the optimizer's tensors, if they are not constant.
    """
    return {"optimizer": optimizer or {}, "loss": {}, "meta": (scene, window), "batch": batch}


def open_window(plan: Plan, name: str, start: States, records: Sequence[Record]) -> Window:
    """Return the window of a level after these records of one turn.

    Args:
        plan: of the graph.
        name: the level.
        start: states before the records.
        records: what has happened in this turn.
    """
    shared = plan.timetable.shared[name]
    if not shared:
        return NO_WINDOW
    old: list[Record] = []
    new: list[Record] = []
    for record in records:
        if record.level == name:
            old, new = [*old, *new], []
        elif record.level in shared:
            new.append(record)
    # sorted: trees are flattened in this order, which must not change from process to process
    start = {other: start[other] for other in sorted(shared)}
    # what the level has seen matters only to those among the shared that share others themselves
    if not any(plan.timetable.shared[other] for other in shared):
        start, old = find_states(start, old), []
    return Window(start, (*old, *new), len(old))


def find_states(start: States, records: Iterable[Record]) -> States:
    """Return the states after some records."""
    return start | {record.level: record.after for record in records}
