"""Where trials are written down: in memory, or in a file from which a search goes on."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import errno
import json
import math
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from metaopt.black_box.space import Space, Values
from metaopt.black_box.trial import Status, Trial

Suggest = Callable[[Sequence[Trial]], Values]
MOST_ATTEMPTS = 3
# what a line that is no event of ours leads to; the last two for numbers and nests without end
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
DIED = f"the process that ran it died {MOST_ATTEMPTS} times"


class Journal(abc.ABC):
    """Holds the trials of one search, and decides who runs which.

    A trial whose process has died is run again under its own number; after three such deaths it
    has failed. One that was released, by an interruption, is run again too, and that counts for
    nothing.
    """

    @abc.abstractmethod
    def open(self, name: str, space: Space, objective: str) -> None:
        """Begin, or go on with what is there.

        Raises:
            ValueError: what is there is of another search, or damaged.
        """

    @abc.abstractmethod
    def read(self) -> list[Trial]:
        """Return all trials, by number."""

    @abc.abstractmethod
    def begin(self, suggest: Suggest, limit: int | None) -> Trial | None:
        """Return a trial to run.

        It is one whose process has died, or else a new one, unless there are `limit`. None: neither
        is there.
        """

    @abc.abstractmethod
    def report(self, trial: Trial, step: int, loss: float) -> None:
        """Write down a loss on the way."""

    @abc.abstractmethod
    def end(self, trial: Trial) -> None:
        """Write down a trial that has ended."""

    @abc.abstractmethod
    def release(self, trial: Trial, *, died: bool) -> None:
        """Let a trial that was begun be begun again; it counts as a death only if it `died`.

        A trial that has ended stays as it is.
        """

    @abc.abstractmethod
    def wait(self) -> bool:
        """Wait a moment for trials that run elsewhere; False if there can be none."""


class Memory(Journal):
    """Trials of this process; they go with it."""

    def __init__(self) -> None:
        self._trials: list[Trial] = []
        self._orphans: deque[int] = deque()
        self._released: set[int] = set()  # of the orphans, those whose process did not die

    def open(self, name: str, space: Space, objective: str) -> None:
        """Do nothing."""

    def read(self) -> list[Trial]:
        return list(self._trials)

    def begin(self, suggest: Suggest, limit: int | None) -> Trial | None:
        while self._orphans:
            orphan = self._trials[self._orphans.popleft()]
            if orphan.has_ended:  # it was evaluated elsewhere, and told
                continue
            attempt = self._count_next(orphan)
            if attempt <= MOST_ATTEMPTS:
                return self._write_begin(orphan.number, orphan.values, attempt)
            self.end(dataclasses.replace(orphan, status="failed", error=DIED))
        if limit is not None and len(self._trials) >= limit:
            return None
        return self._write_begin(len(self._trials), suggest(self.read()), 1)

    def report(self, trial: Trial, step: int, loss: float) -> None:
        self._note({"event": "report", "number": trial.number, "step": step, "loss": loss})

    def end(self, trial: Trial) -> None:
        names = ("number", "status", "loss", "error", "seconds")
        facts = {name: getattr(trial, name) for name in names}
        # strict JSON has no nan
        metrics = {n: v if math.isfinite(v) else str(v) for n, v in trial.metrics.items()}
        self._note({"event": "end", **facts, "metrics": metrics})

    def release(self, trial: Trial, *, died: bool) -> None:
        if self._trials[trial.number].has_ended or trial.number in self._orphans:
            return
        self._orphans.append(trial.number)
        if not died:
            event = {"event": "release", "number": trial.number}
            self._update(event)
            # a full disk may be what ends the search; then the next one counts a death
            with contextlib.suppress(OSError):
                self._write(event)

    def wait(self) -> bool:
        return False

    def _count_next(self, trial: Trial) -> int:
        """Return the number of the attempt that follows: one more for each death."""
        return trial.attempt + (trial.number not in self._released)

    def _write_begin(self, number: int, values: Values, attempt: int) -> Trial:
        self._note({"event": "begin", "number": number, "values": values, "attempt": attempt})
        return self._trials[number]

    def _note(self, event: Mapping[str, Any]) -> None:
        self._write(event)
        self._update(event)

    def _write(self, event: Mapping[str, Any]) -> None:
        """Keep an event for later processes; here there are none."""

    def _update(self, event: Mapping[str, Any]) -> None:
        """Bring the trials up to date. Also what a file is read with: so both are the same."""
        number = event["number"]
        if event["event"] == "release":
            self._released.add(number)
            return
        self._released.discard(number)
        if event["event"] == "begin":
            begun = Trial(number, event["values"], attempt=event["attempt"])
            if number == len(self._trials):
                self._trials.append(begun)
            else:
                self._trials[number] = begun
            return
        trial = self._trials[number]
        if event["event"] == "report":
            reports = {**trial.reports, event["step"]: event["loss"]}
            self._trials[number] = dataclasses.replace(trial, reports=reports)
            return
        self._trials[number] = dataclasses.replace(
            trial,
            status=event["status"],
            loss=event["loss"],
            metrics={name: float(value) for name, value in event["metrics"].items()},
            error=event["error"],
            seconds=event["seconds"],
        )


class JsonLines(Memory):
    """A file that is only appended to, one event a line.

    Events are the search and a trial's begin, report, release and end. Each line is on the disk
    before the search goes on. A last line that was cut off by a crash is dropped. One process at a
    time writes; for more there is `OptunaJournal`.

    Args:
        path: the file. It, and its folder, are made if need be.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self._space: Space | None = None
        self._size = 0

    def open(self, name: str, space: Space, objective: str) -> None:
        self._space = space
        head = describe(name, space, objective)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = self.path.read_bytes() if self.path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), start=1):
            self._read_line(number, line, head)
        if not whole and not _encode(head).startswith(content):
            raise ValueError(f"{self.path} is not the file of a search. Name a new one.")
        # only now, that the file is known to be ours, what a crash left behind the last line
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))
        self._size = len(whole)
        self._orphans.extend(trial.number for trial in self._trials if not trial.has_ended)
        if not whole:
            self._write(head)
            _sync_folder(self.path.parent)

    def _read_line(self, number: int, line: bytes, head: Mapping[str, Any]) -> None:
        where = f"{self.path}, line {number}"
        try:
            event = json.loads(line)
            if number == 1:
                check_head(self.path, event, head)
                return
            self._check_event(event)
            self._update(event)
        except UNREADABLE as error:
            if isinstance(error, OtherSearchError):
                raise
            raise ValueError(
                f"{where} is not an event of a search: {error!r}. Was the file edited? Name a new "
                "one to begin again."
            ) from error

    def _check_event(self, event: Mapping[str, Any]) -> None:
        """Raise if an event does not follow on those before it."""
        assert self._space is not None
        kind, number = event["event"], event["number"]
        known = len(self._trials)
        is_new = kind == "begin" and number == known
        if type(number) is not int or not (is_new or 0 <= number < known):
            raise ValueError(f"trial {number!r}, where there are {known} before it")
        # an interruption may come when the end is written, and before it is known here
        if not is_new and self._trials[number].has_ended and kind != "release":
            raise ValueError(f"trial {number} has ended before")
        if kind == "begin":
            attempt = 1 if is_new else self._count_next(self._trials[number])
            if event["attempt"] != attempt:
                found = f"attempt {event['attempt']!r} of trial {number}"
                raise ValueError(f"{found}, where {attempt} follows")
            self._space.check(event["values"])
        elif kind == "report":
            _check_numbers({"step": event["step"], "loss": event["loss"]})
        elif kind == "end":
            if event["status"] not in get_args(Status):
                raise ValueError(f"the status {event['status']!r}")
            has_loss = event["status"] in ("done", "stopped early")
            _check_numbers({"loss": event["loss"]} if has_loss else {})
        elif kind != "release":
            raise ValueError(f"the event {kind!r}")

    def _write(self, event: Mapping[str, Any]) -> None:
        line = _encode(event)
        with self.path.open("ab", buffering=0) as file:
            if file.tell() != self._size:
                raise RuntimeError(
                    f"{self.path} was written by another process, or by another search of this "
                    "one. One at a time goes on with a file; for more write "
                    "journal=mo.OptunaJournal(path)."
                )
            try:
                if file.write(line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
                os.fsync(file.fileno())
            except BaseException:  # half a line must not stand before the next one
                file.truncate(self._size)
                raise
        self._size += len(line)


class OtherSearchError(ValueError):
    """The file is of another search."""


def _encode(event: Mapping[str, Any]) -> bytes:
    """Return a line of the file."""
    return json.dumps(event, allow_nan=False).encode() + b"\n"


def describe(name: str, space: Space, objective: str) -> dict[str, Any]:
    """Return the first line of a journal: what search it is of."""
    ranges = {name: repr(parameter) for name, parameter in space.items()}
    return {"event": "search", "name": name, "objective": objective, "space": ranges}


def check_head(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if a journal is of another search, with what differs."""
    if found["event"] != "search":
        raise ValueError("the first line does not describe a search")
    facts = {
        key: (found[key], wanted[key]) for key in ("name", "objective") if found[key] != wanted[key]
    }
    for name in {**found["space"], **wanted["space"]}:
        pair = found["space"].get(name), wanted["space"].get(name)
        if pair[0] != pair[1]:
            facts[f"parameter {name!r}"] = pair
    if facts:
        text = "; ".join(
            f"{key}: {there} there, {here} here" for key, (there, here) in facts.items()
        )
        raise OtherSearchError(
            f"{path} is of another search ({text}). Name another file, or make the search as it "
            "was."
        )


def _check_numbers(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise ValueError(f"the {name} {value!r}")


def _sync_folder(folder: Path) -> None:
    """Bring a new file's name to the disk."""
    if os.name == "nt":  # where folders cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
