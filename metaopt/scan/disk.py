"""The states of one loop in a directory, and how far its backward pass has come."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaopt.autodiff.replay import Ambient
from metaopt.scan.tensor_file import digest_of, read, read_facts, write

try:
    import fcntl
except ImportError:  # Windows: nobody notices two loops in one directory there
    fcntl = None  # type: ignore[assignment]

_KINDS = {  # file name -> what happens if it is deleted
    "state": "Delete it and run the same program again: this state is computed anew from an earlier one.",
    "steps": "Delete it and run the same program again: the forward run goes on before it.",
    "pulled": "Delete it and run the same program again: the backward pass starts anew, from the states that are there.",
    "row": "Delete it and run the same program again: the backward pass starts anew, from the states that are there.",
}


class Disk:
    """Keeps what a loop needs to be run and reversed by several processes, of which all but the
    last one are killed.

    Files, each written whole and with a checksum: `state-t` is the carry of time t; `steps-t` the
    outs and the random states of the steps before t, back to the file before it; `pulled` the
    cotangents of the carry and the inputs where the backward pass stands; `row-t` those of x_t. All
    name the loop they belong to.

    Args:
        directory: where they lie; nothing else in it is touched.
        settings: of the loop.
    """

    def __init__(self, directory: Path, settings: str):
        self.directory = directory
        self.settings = settings
        self._loop: dict[str, str] = {}
        self._lock: int | None = None
        self._finished = False

    def _open(self, loop: dict[str, str]) -> None:
        """Take hold of the directory for the loop with these facts.

        Raises:
            OSError: there is no such directory.
            ValueError: it belongs to another loop, another one is using it, or a file in it is
                damaged.
        """
        self.acquire()
        self._loop = loop
        for partial in self.directory.glob("*.partial"):
            if partial.stem.split("-")[0] in _KINDS:
                partial.unlink()
        for kind, remedy in _KINDS.items():
            for path in self._paths(kind):
                self._check(path, read_facts(path, remedy))

    def acquire(self) -> None:
        """Lock the directory until `release`, or until this process ends, however it ends."""
        if not self.directory.is_dir():
            raise FileNotFoundError(
                f"Revolve: `directory` must exist, got {str(self.directory)!r}. It is not made for "
                f"you, lest a disk that is not mounted goes unnoticed. Call `mkdir -p "
                f"{self.directory}`."
            )
        if self._lock is not None or fcntl is None:
            return
        self._lock = os.open(self.directory, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = None
            raise ValueError(
                f"Revolve: `directory` must serve one loop at a time, got {str(self.directory)!r}, "
                f"which a loop that waits for its "
                "backward pass is using. Run that backward pass first (or drop its results), or "
                "use another directory."
            ) from None

    def release(self) -> None:
        """Let another loop use the directory."""
        if self._lock is not None:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            os.close(self._lock)
            self._lock = None

    def __del__(self) -> None:
        self.release()

    @contextmanager
    def reopened(self, again: bool) -> Iterator[None]:
        """Lock the directory for a backward pass; `again` says that this is to be differentiated in
        its turn.

        Raises:
            ValueError: a second derivative is asked for, or the files were removed after a backward
                pass.
        """
        with self.released_on_error():
            if again:
                raise ValueError(
                    'A loop with Revolve(store="disk") has first derivatives only: states on disk '
                    'have left the graph. Use store="cpu" for second ones. If none are meant, '
                    "leave out `create_graph=True`, and inside "
                    "`torch.func.grad` detach what requires grad outside of it."
                )
            if self._finished:
                raise ValueError(
                    'A loop with Revolve(store="disk") can be reversed once, got a second backward '
                    "pass after the snapshots in "
                    f"{self.directory} were removed. Run the loop again."
                )
            self.acquire()
            yield

    @contextmanager
    def released_on_error(self) -> Iterator[None]:
        """While entered, whatever is raised releases the directory, so that the same process may
        try again.
        """
        try:
            yield
        except BaseException:
            self.release()
            raise

    def finish(self) -> None:
        """Remove the files.

        In this order a process that is killed meanwhile leaves nothing that misleads the next one.
        """
        for kind in _KINDS:
            for path in self._paths(kind):
                path.unlink(missing_ok=True)
        self._finished = True
        self.release()

    def forward(
        self,
        step: Callable[[int, list[Any]], tuple[list[Any], list[Any]]],
        first: list[Any],
        times: Sequence[int],
        facts: dict[str, str],
        near: Sequence[Any],
        ambients: list[Ambient],
    ) -> list[Any]:
        """Run a loop, or go on where a killed process stopped; return the last carry and the outs.

        What a function computes cannot be seen, but its steps can: another loss, other constants of
        an optimizer or another random state in which it matters give other steps. So the first one
        is made again, and, since some settings matter only later, the one after the state from
        which this process goes on. These tell one loop from another.

        Args:
            step: (t, carry) -> (next carry, out).
            first: the carry of time 0.
            times: whose states are to be held; the last one is the length of the loop.
            facts: what else tells one loop from another.
            near: tensors on every device that the loop uses.
            ambients: empty; receives the random state before each step.
        """
        with self.released_on_error():
            start = Ambient.now(near)
            carry, out = step(0, first)
            carry = contiguous(carry)
            self._open(
                {
                    **facts,
                    "settings": digest_of([self.settings]),
                    "first step": digest_of([*carry, *out]),
                }
            )
            outs, found = self._steps(start)
            done = max((t for t in self if t <= len(outs)), default=0)
            self._check_step(step, first, found)
            if done:
                found[done].reinstate()
                carry = [leaf.to(own.device) for leaf, own in zip(self[done], first, strict=True)]
                outs = [
                    [leaf.to(own.device) for leaf, own in zip(early, out, strict=True)]
                    for early in outs[:done]
                ]
                ambients += found[:done]
            else:
                outs = [out]
                ambients.append(start)
            written = done
            for t in range(len(outs), times[-1] + 1):
                now, before, then = Ambient.now(near, ambients[-1]), carry, ""
                if t < times[-1]:
                    ambients.append(now)
                    carry, out = step(t, before)
                    carry = contiguous(carry)
                    outs.append(out)
                    then = digest_of([*carry, *out])
                if t in times and t > done:
                    self._put_steps(written, outs[written:t], [*ambients[written:t], now])
                    self._put_state(t, before, then)
                    written = t
            return [*carry, *chain(*outs)]

    def _check_step(
        self,
        step: Callable[[int, list[Any]], tuple[list[Any], list[Any]]],
        first: list[Any],
        ambients: Sequence[Ambient],
    ) -> None:
        """Make the step after the last state again of which it is known what it gave, and raise if
        it gives something else.
        """
        known = {
            t: read_facts(self._path("state", t), _KINDS["state"])["then"]
            for t in self
            if t < len(ambients)
        }
        last = max((t for t, then in known.items() if then), default=None)
        if last is None:
            return
        with ambients[last].restored():
            carry, out = step(
                last, [leaf.to(own.device) for leaf, own in zip(self[last], first, strict=True)]
            )
        if digest_of([*contiguous(carry), *out]) != known[last]:
            raise ValueError(
                f"Revolve: `directory` must be empty or hold the snapshots of this very loop, got "
                f"those of another one in {self.directory}: step {last}, made again, does not give "
                f"what it gave. Is the loss or the optimizer another? "
                "Run the program that wrote them to its end, delete its files, or give each loop a "
                "directory of its own."
            )

    def __iter__(self) -> Iterator[int]:
        """Yield the times whose states are held, in order."""
        return iter([_time(path) for path in self._paths("state")])

    def __getitem__(self, time: int) -> list[Tensor]:
        tensors, _ = self._read("state", self._path("state", time))
        return [tensors[str(i)] for i in range(len(tensors))]

    def __setitem__(self, time: int, carry: Sequence[Tensor]) -> None:
        self._put_state(time, carry, "")

    def _put_state(self, time: int, carry: Sequence[Tensor], then: str) -> None:
        """Keep a state, with the digest of what the step after it gives, if that is known."""
        self._write("state", time, {str(i): leaf for i, leaf in enumerate(carry)}, then=then)

    def pop(self, time: int, default: None = None) -> None:
        """Remove the state of a time, if it is held."""
        self._path("state", time).unlink(missing_ok=True)

    def _put_steps(
        self, low: int, outs: Sequence[Sequence[Tensor]], ambients: Sequence[Ambient]
    ) -> None:
        """Keep the outs of the steps from `low` on, and the random states before each of them and
        after the last.
        """
        # most steps share one state
        randoms = {id(ambient.random): ambient.random for ambient in ambients}
        places = {key: place for place, key in enumerate(randoms)}
        which = torch.tensor([places[id(ambient.random)] for ambient in ambients])
        tensors = {"random": torch.stack(list(randoms.values())), "which": which}
        tensors |= {
            f"cuda.{index}": torch.stack([ambient.cuda[index] for ambient in ambients])
            for index in ambients[0].cuda
        }
        tensors |= {
            f"out.{i}.{j}": leaf for i, out in enumerate(outs) for j, leaf in enumerate(out)
        }
        self._write("steps", low + len(outs), tensors, low=str(low), width=str(len(outs[0])))

    def _steps(self, like: Ambient) -> tuple[list[list[Tensor]], list[Ambient]]:
        """Return all outs without a gap from the first step on, and one random state more; autocast
        is that of `like`.
        """
        outs: list[list[Tensor]] = []
        ambients: list[Ambient] = []
        for path in self._paths("steps"):
            tensors, facts = self._read("steps", path)
            low = int(facts["low"])
            if low > len(outs):
                break
            del outs[low:], ambients[low:]
            cuda = {
                int(name[5:]): states
                for name, states in tensors.items()
                if name.startswith("cuda.")
            }
            # torch reads a state wrongly where it is part of a tensor
            randoms = [state.clone() for state in tensors["random"]]
            for i, place in enumerate(tensors["which"].tolist()):
                ambients.append(
                    Ambient(
                        randoms[place],
                        {index: states[i].clone() for index, states in cuda.items()},
                        like.autocast,
                    )
                )
            width = range(int(facts["width"]))
            outs += [[tensors[f"out.{i}.{j}"] for j in width] for i in range(_time(path) - low)]
        return outs, ambients

    def put_pulled(
        self, time: int, bars: dict[str, Tensor], row: dict[str, Tensor], origin: str
    ) -> None:
        """Keep what the backward pass knows when it has come down to a time: its cotangents, and
        those of x at that time.
        """
        if row:
            self._write("row", time, row)
        self._write("pulled", None, bars, high=str(time), origin=origin, rows=str(len(row)))

    def pulled(
        self, length: int, origin: str
    ) -> tuple[int, dict[str, Tensor], list[dict[str, Tensor]]]:
        """Return (the time to which the backward pass has come down, its cotangents, those of x
        from the last step down).

        Raises:
            ValueError: it started from other cotangents.
        """
        path = self._path("pulled")
        if not path.exists():
            return length, {}, []
        bars, facts = self._read("pulled", path)
        if facts["origin"] != origin:
            raise ValueError(
                f"The backward pass must be the one that was interrupted, got other cotangents or "
                f"other tensors that require grad than {path} has started from. {_KINDS['pulled']}"
            )
        high = int(facts["high"])
        paths = [self._path("row", time) for time in range(length - 1, high - 1, -1)]
        if facts["rows"] == "0":
            return high, bars, []
        if not all(path.exists() for path in paths):
            return length, {}, []
        return high, bars, [self._read("row", path)[0] for path in paths]

    def _write(self, kind: str, time: int | None, tensors: dict[str, Tensor], **facts: str) -> None:
        write(self._path(kind, time), tensors, {**self._loop, **facts})
        if self._lock is not None:
            os.fsync(self._lock)  # the directory: its new entry

    def _read(self, kind: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
        tensors, facts = read(path, _KINDS[kind])
        self._check(path, facts)
        return tensors, facts

    def _check(self, path: Path, facts: dict[str, str]) -> None:
        """Raise if a file belongs to another loop."""
        others = [
            f"{name} {facts.get(name)} instead of {value}"
            for name, value in self._loop.items()
            if facts.get(name) != value
        ]
        if others:
            raise ValueError(
                f"Revolve: `directory` must be empty or hold the snapshots of this very loop, got "
                f"{path} of another one: {'; '.join(others)}. Run the program that wrote it to its "
                f"end, delete its files, or give each loop a "
                "directory of its own."
            )

    def _path(self, kind: str, time: int | None = None) -> Path:
        return self.directory / f"{kind if time is None else f'{kind}-{time:08}'}.safetensors"

    def _paths(self, kind: str) -> list[Path]:
        """Return the files of a kind, in the order of time."""
        digits = "[0-9]" * 8
        return sorted(
            [
                *self.directory.glob(f"{kind}-{digits}.safetensors"),
                *self.directory.glob(f"{kind}.safetensors"),
            ]
        )


def _time(path: Path) -> int:
    return int(path.stem.split("-")[1])


def contiguous(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves as a file gives them back: the layout decides the order of sums, hence the
    last bits.
    """
    return [leaf.contiguous() for leaf in leaves]
