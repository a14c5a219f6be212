"""One search by many processes and machines, through a file of Optuna's."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaopt.black_box.isolation import isolate
from metaopt.black_box.journal import (
    DIED,
    MOST_ATTEMPTS,
    UNREADABLE,
    Journal,
    OtherSearchError,
    Suggest,
    check_head,
    describe,
)
from metaopt.black_box.optuna import to_optuna_trial
from metaopt.black_box.space import Space
from metaopt.black_box.trial import Trial
from metaopt.checks import check_positive

FIRST = b'{"op_code"'  # how the file begins
BEATS = 5  # signs of life within the patience
RELEASED, DEAD = "released", "dead"  # in place of a sign
LONGEST_NAP = 1.0  # seconds between two looks at trials that run elsewhere


class OptunaJournal(Journal):
    """Trials in Optuna's `JournalStorage`, a file that many machines may share, over NFS too.

    Every worker runs the same program, with `journal=OptunaJournal(path)` and any backend. Numbers
    and values are given out under a lock, so that each worker's suggestion knows the trials of all.
    While a trial runs its worker writes a sign of life, a few times within `patience`. A worker
    that reads no new one for that long, by its own clock, takes the trial over under the same
    number; should the first still be alive, the result that comes first counts. A worker that finds
    nothing to begin waits for the trials of others, in case it has to take them over.

    The study has the search's name; Optuna's own tools (its dashboard, `optuna.load_study`) read
    it.

    Args:
        path: the file, in a folder that all see.
        patience: seconds without a sign of life after which a worker counts as dead.

    Raises:
        ValueError: `patience` is not positive.
        ModuleNotFoundError: if the extra `blackbox` is not installed.
    """

    def __init__(self, path: str | Path, *, patience: float = 300.0):
        self.path = Path(path)
        self.patience = check_positive(self, "patience", patience)
        self._me = uuid.uuid4().hex
        self._mine: dict[int, int] = {}  # number of a trial that runs here -> signs of life
        self._seen: dict[int, tuple[Any, float]] = {}  # -> the last new one, and when it was read
        self._pulse: threading.Thread | None = None
        self._guard = threading.Lock()  # of `_mine`, and of the signs: none follows a release

    def open(self, name: str, space: Space, objective: str) -> None:
        self._space = space
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with isolate("`OptunaJournal`", "optuna", 0), self._lock():
            try:
                self._drop_cut_line()
                self._open_study(name, describe(name, space, objective))
            except (*UNREADABLE, AssertionError) as error:
                if isinstance(error, OtherSearchError):
                    raise
                raise ValueError(
                    f"{self.path} is not a journal of Optuna's, or it is damaged: {error!r}. Name "
                    "a new one to begin again."
                ) from error

    def _open_study(self, name: str, head: dict[str, Any]) -> None:
        from optuna import create_study
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self._storage: Any = JournalStorage(JournalFileBackend(str(self.path)))
        study = create_study(storage=self._storage, study_name=name, load_if_exists=True)
        self._study = self._storage.get_study_id_from_name(name)
        check_head(self.path, study.user_attrs.get("search", head), head)
        study.set_user_attr("search", head)

    def _drop_cut_line(self) -> None:
        """Take off what a crash left behind the last line; Optuna would write on in that line."""
        from optuna.storages.journal import JournalFileSymlinkLock

        if not self.path.exists():
            return
        lock = JournalFileSymlinkLock(str(self.path))  # under which Optuna writes whole lines
        lock.acquire()
        try:
            content = self.path.read_bytes()
            if content[: len(FIRST)] != FIRST[: len(content)]:  # it may be shorter
                raise ValueError("the first line is none of Optuna's")
            os.truncate(self.path, content.rfind(b"\n") + 1)
        finally:
            lock.release()

    def read(self) -> list[Trial]:
        return [_from_optuna(frozen) for frozen in self._read()]

    def begin(self, suggest: Suggest, limit: int | None) -> Trial | None:
        with self._lock():
            for frozen in self._read():
                if frozen.number in self._mine or not self._is_dead(frozen):
                    continue
                orphan = _from_optuna(frozen)
                attempt = orphan.attempt + (_get_sign(frozen) != RELEASED)
                if attempt <= MOST_ATTEMPTS:
                    return self._claim(dataclasses.replace(orphan, attempt=attempt))
                self.end(dataclasses.replace(orphan, status="failed", error=DIED))
            trials = self.read()
            if limit is not None and len(trials) >= limit:
                return None
            trial = Trial(len(trials), suggest(trials))
            self._storage.create_new_trial(self._study, to_optuna_trial(self._space, trial, None))
            return self._claim(trial)

    def report(self, trial: Trial, step: int, loss: float) -> None:
        with self._unless_ended():
            self._storage.set_trial_intermediate_value(self._find(trial.number), step, loss)

    def end(self, trial: Trial) -> None:
        from optuna.trial import TrialState

        state = {"done": TrialState.COMPLETE, "stopped early": TrialState.PRUNED}
        names = ("status", "metrics", "error", "seconds")
        facts = {name: getattr(trial, name) for name in names}
        with self._unless_ended():
            # first the facts: a trial that has ended cannot be changed
            self._storage.set_trial_user_attr(self._find(trial.number), "facts", facts)
            self._storage.set_trial_state_values(
                self._find(trial.number),
                state.get(trial.status, TrialState.FAIL),
                None if trial.loss is None else [trial.loss],
            )
        with self._guard:
            self._mine.pop(trial.number, None)

    def release(self, trial: Trial, *, died: bool) -> None:
        with self._guard, self._unless_ended():
            self._mine.pop(trial.number, None)
            sign = DEAD if died else RELEASED
            self._storage.set_trial_user_attr(self._find(trial.number), "alive", sign)

    def wait(self) -> bool:
        others = [t for t in self.read() if not t.has_ended and t.number not in self._mine]
        if others:
            time.sleep(min(LONGEST_NAP, self.patience / BEATS))
        return bool(others)

    def _claim(self, trial: Trial) -> Trial:
        place = self._find(trial.number)
        self._storage.set_trial_user_attr(place, "attempt", trial.attempt)
        with self._guard:
            self._storage.set_trial_user_attr(place, "alive", [self._me, 0])
            self._mine[trial.number] = 0
        if self._pulse is None or not self._pulse.is_alive():
            self._pulse = threading.Thread(target=self._beat, daemon=True)
            self._pulse.start()
        return dataclasses.replace(trial, reports={})

    def _beat(self) -> None:
        """Write a sign of life for each trial that runs here, until there is none."""
        while self._mine:
            time.sleep(self.patience / BEATS)
            with (
                self._guard,
                contextlib.suppress(OSError),
            ):  # a disk that is full may have room later
                for number in self._mine:
                    self._mine[number] += 1
                    sign = [self._me, self._mine[number]]
                    with self._unless_ended():
                        self._storage.set_trial_user_attr(self._find(number), "alive", sign)

    def _is_dead(self, frozen: Any) -> bool:
        """Return True for a trial that nobody runs: let go, or without a new sign for too long."""
        if frozen.state.is_finished():
            return False
        sign = _get_sign(frozen)
        if sign in (RELEASED, DEAD):
            return True
        now = time.monotonic()
        before, since = self._seen.get(frozen.number, (None, now))
        if sign != before:
            since = now
        self._seen[frozen.number] = (sign, since)
        return now - since > self.patience

    def _read(self) -> list[Any]:
        found = self._storage.get_all_trials(self._study, deepcopy=False)
        return sorted(found, key=lambda frozen: frozen.number)

    def _find(self, number: int) -> int:
        place: int = self._storage.get_trial_id_from_study_id_trial_number(self._study, number)
        return place

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """While entered, no other worker is; one that died inside is waited for with patience."""
        from optuna.storages.journal import JournalFileOpenLock

        grace = max(3, round(self.patience))  # seconds; Optuna advises against less
        lock = JournalFileOpenLock(f"{self.path}.begin", grace_period=grace)
        lock.acquire()
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # it was taken from us
                lock.release()

    @contextlib.contextmanager
    def _unless_ended(self) -> Iterator[None]:
        """While entered, it is no error that another worker has ended the trial."""
        from optuna.exceptions import UpdateFinishedTrialError

        with contextlib.suppress(UpdateFinishedTrialError):
            yield


def _get_sign(frozen: Any) -> Any:
    """Return the last sign of life: a worker with a count, or that there is none."""
    return frozen.user_attrs.get("alive", "begun")


def _from_optuna(frozen: Any) -> Trial:
    facts = frozen.user_attrs.get("facts", {})
    state = frozen.state.name
    status = {"COMPLETE": "done", "PRUNED": "stopped early", "FAIL": facts.get("status", "failed")}
    return Trial(
        frozen.number,
        dict(frozen.params),
        status=status.get(state, "running"),
        loss=frozen.value if state in ("COMPLETE", "PRUNED") else None,
        metrics=facts.get("metrics", {}),
        reports=dict(frozen.intermediate_values),
        error=facts.get("error"),
        seconds=facts.get("seconds"),
        attempt=frozen.user_attrs.get("attempt", 1),
    )
