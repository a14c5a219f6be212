"""The states of one loop on disk, and how far it has come, forward and on the way back.

The loop can be run and reversed by several processes, of which all but the last one are killed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.replay import Ambient
from metaopt.scan.directory import Directory
from metaopt.scan.loop import Bars, Loop, Run, ScanGiven, ScanResult, run_forward
from metaopt.scan.revolve import choose_times
from metaopt.scan.tensor_file import digest_of
from metaopt.tree import Tree

_ANEW = "Delete it and run the same program again: "
_BACK = _ANEW + "the backward pass starts anew, from the states that are there."
# Kind -> what happens if a file is deleted. They are removed in this order: without states the
# next process runs forward as if nothing were there, and finds the backward pass as it was.
_KINDS = {
    "state": _ANEW + "this state is computed anew from an earlier one.",
    "steps": _ANEW + "the forward run goes on before it.",
    "pulled": _BACK,
    "row": _BACK,
}


class Disk:
    """A store of states that outlives its process, with all that is needed to go on from them.

    Files: `state-t` is the carry of time t; `steps-t` the outs and the random states of the steps
    before t, back to the file before it; `pulled` the cotangents of the carry and the inputs where
    the backward pass stands; `row-t` those of x_t.

    Args:
        path: of the directory.
        settings: of the loop.
        carry: the initial one.
    """

    def __init__(self, path: Path, settings: str, carry: Tree):
        self._directory = Directory(path, _KINDS)
        self._settings = settings
        self._devices = _devices(carry)
        self._written = 0  # steps whose outs are on disk
        self._first = ""  # digest of the first step after the newest state
        self._asked = ""  # digest of the cotangents and the wanted leaves
        self._finished = False

    def put(self, time: int, state: Tree) -> None:
        """Write a state."""
        self._directory.write("state", time, state)

    def get(self, time: int) -> Tree:
        """Read a state."""
        return self._directory.read("state", time, self._devices)[0]

    def drop(self, time: int) -> None:
        """Remove a state, if it is there."""
        self._directory.file("state", time).unlink(missing_ok=True)

    def times(self) -> list[int]:
        """Return the times of the states that are there, in order."""
        return self._directory.times("state")

    def run(self, loop: Loop, given: ScanGiven, length: int) -> ScanResult:
        """Run a loop, or go on where a killed process stopped.

        What a function computes cannot be seen, but its steps can: another loss, other constants of
        an optimizer or another random state in which it matters give other steps. So the first one
        is made again, and, since some settings matter only later, the one after the state from
        which this process goes on. These tell one loop from another.
        """
        snapshots = loop.held.snapshots
        run, leaves = Run(given.carry, loop.ambients), tree.leaves(given)
        with self._directory.lock():
            first = [loop.row(given.xs, 0)]
            run_forward(loop, given.inputs, run, first, note=lambda run: None)
            self._directory.claim(
                {
                    "length": str(length),
                    "snapshots": str(snapshots),
                    "inputs": digest_of(leaves),
                    "settings": digest_of([self._settings]),
                    "first step": _digest_of_last(run),
                }
            )
            self._resume(loop, given, run)
            note = partial(self._note, times={*choose_times(length, snapshots), length})
            rows = (loop.row(given.xs, t) for t in range(run.time, length))
            run_forward(loop, given.inputs, run, rows, note)
            run.ambients.append(Ambient.now(leaves, run.ambients[-1]))
            note(run)
        return ScanResult(run.carry, run.outs, {})

    def _note(self, run: Run, times: set[int]) -> None:
        """Write down the steps since the last state and the present one, if it is to be held."""
        if run.time == self._written + 1:
            self._first = _digest_of_last(run)
        if run.time in times and run.time > self._written:
            steps = _pack(run.outs[self._written :], run.ambients[self._written :])
            self._directory.write("steps", run.time, steps, first=self._first)
            self.put(run.time, run.carry)
            self._written = run.time

    def _resume(self, loop: Loop, given: ScanGiven, run: Run) -> None:
        """Go on from the last state that killed processes have left, if there is one."""
        outs, ambients, digests = list[Tree](), list[Ambient](), dict[int, str]()
        like = _devices(_pack(run.outs, run.ambients))
        for high in self._directory.times("steps"):
            steps, facts = self._directory.read("steps", high, like)
            found, states = _unpack(steps, run.ambients[0].autocast)
            low = high - len(found)
            if low > len(outs):
                break  # a file is missing
            outs[low:], ambients[low:], digests[low] = found, states, facts["first"]
        self._check_step(loop, given, ambients, digests)
        done = max((time for time in self.times() if time <= len(outs)), default=0)
        if done:
            ambients[done].reinstate()
            run.carry, run.outs[:], run.ambients[:] = self.get(done), outs[:done], ambients[:done]
            self._written = done

    def _check_step(
        self, loop: Loop, given: ScanGiven, ambients: list[Ambient], digests: dict[int, str]
    ) -> None:
        """Repeat the first step after the newest state whose result is on record, and compare."""
        last = max((time for time in self.times() if time in digests), default=None)
        if last is None:
            return
        again = Run(self.get(last), [])
        with ambients[last].restored():
            run_forward(loop, given.inputs, again, [loop.row(given.xs, last)], lambda run: None)
        if _digest_of_last(again) != digests[last]:
            raise ValueError(
                f"Revolve: `directory` must be empty or hold the snapshots of this very loop, got "
                f"those of another one in {self._directory.path}: step {last}, made again, does "
                f"not give what it gave. Is the loss or the optimizer another? Run the program "
                f"that wrote them to its end, delete its files, or give each loop a directory of "
                f"its own."
            )

    @contextmanager
    def reopen(self, again: bool) -> Iterator[None]:
        """Lock the directory for a backward pass.

        Args:
            again: whether the backward pass is itself to be differentiated.

        Raises:
            ValueError: `again` is True, or the files were removed after a backward pass.
        """
        with self._directory.lock():
            if again:
                raise ValueError(
                    'A loop with Revolve(store="disk") has first derivatives only: states on disk '
                    'have left the graph. Use store="cpu" for second ones. If none are meant, '
                    "leave out `create_graph=True`, and inside `torch.func.grad` detach what "
                    "requires grad outside of it."
                )
            if self._finished:
                raise ValueError(
                    'A loop with Revolve(store="disk") can be reversed once, got a second backward '
                    f"pass after the snapshots in {self._directory.path} were removed. Run the "
                    "loop again."
                )
            yield

    def resume_back(self, bars: Bars, near: ScanGiven, asked: Tree) -> None:
        """Take over what killed backward passes have found, if anything.

        Args:
            bars: what is known before the first step of the way back.
            near: leaves of the loop, with those of x at one step.
            asked: the cotangents that the backward pass starts from, and what it is to find.

        Raises:
            ValueError: they started from others.
        """
        self._asked = digest_of(tree.leaves(asked))
        path = self._directory.file("pulled")
        if not path.exists():
            return
        devices = _devices(near)
        start = (devices.carry, devices.inputs)
        (carry, inputs), facts = self._directory.read("pulled", None, start)
        if facts["asked"] != self._asked:
            raise ValueError(
                f"The backward pass must be the one that was interrupted, got other cotangents or "
                f"other tensors that require grad than {path} has started from. {_BACK}"
            )
        times = range(bars.time - 1, int(facts["low"]) - 1, -1)
        if facts["has rows"] == "False":
            rows = [tree.nones(near.xs)] * len(times)
        elif {*times} <= {*self._directory.times("row")}:
            rows = [self._directory.read("row", t, devices.xs)[0] for t in times]
        else:
            return
        bars.time, bars.carry, bars.inputs, bars.rows = times[-1], carry, inputs, rows

    def note_back(self, bars: Bars) -> None:
        """Write down what has been found so far, in the layout in which it is read."""
        row = bars.rows[-1]
        has_row = any(leaf is not None for leaf in tree.leaves(row))
        if has_row:
            self._directory.write("row", bars.time, row)
        facts = {"low": str(bars.time), "asked": self._asked, "has rows": str(has_row)}
        self._directory.write("pulled", None, (bars.carry, bars.inputs), **facts)
        bars.carry, bars.inputs = tree.map(_make_contiguous, (bars.carry, bars.inputs))

    def finish(self) -> None:
        """Remove the files; what they were for is done."""
        self._directory.clear()
        self._finished = True
        self._directory.release()


def _digest_of_last(run: Run) -> str:
    return digest_of(tree.leaves((run.carry, run.outs[-1])))


def _pack(outs: list[Tree], ambients: list[Ambient]) -> Tree:
    """Return as tensors: the outs of some steps, and the random states before each and after all.

    Most steps share one state, which is written once.
    """
    random = torch.stack([now.random for now in ambients])
    states, which = torch.unique_consecutive(random, dim=0, return_inverse=True)
    cuda = {
        device: torch.stack([now.cuda[device] for now in ambients]) for device in ambients[0].cuda
    }
    return tree.stack(outs), states, which, cuda


def _unpack(steps: Tree, autocast: dict[str, Any]) -> tuple[list[Tree], list[Ambient]]:
    """Return what `_pack` made these of."""
    outs, states, which, cuda = steps
    # copies: torch reads a state wrongly where it is part of a tensor
    randoms = [state.clone() for state in states]
    ambients = [
        Ambient(randoms[place], {device: s[i].clone() for device, s in cuda.items()}, autocast)
        for i, place in enumerate(which.tolist())
    ]
    return [
        tree.map(lambda leaf, i=i: leaf[i].clone(), outs) for i in range(len(ambients) - 1)
    ], ambients


def _devices(tensors: Tree) -> Tree:
    return tree.map(lambda leaf: getattr(leaf, "device", None), tensors)


def _make_contiguous(leaf: Tensor | None) -> Tensor | None:
    return None if leaf is None else leaf.contiguous()
