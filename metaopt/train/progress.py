"""How far a training is: a bar in a terminal, now and then a line in a file, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


def show_progress(label: str, total: int, *, done: int = 0, shown: bool) -> Bar | Lines:
    """Return a bar if stderr is a terminal, else lines; a bar that is not drawn if not `shown`."""
    if shown and not sys.stderr.isatty():
        return Lines(label, total, done)
    return Bar(label, total, done, shown=shown)


def show_loss(metrics: Mapping[str, float]) -> dict[str, str]:
    """Return the loss among metrics, of several levels that of the last; {} if there is none."""
    losses = [name for name in metrics if name.split("/")[-1].endswith("loss")]
    return {losses[-1]: f"{metrics[losses[-1]]:.4g}"} if losses else {}


class Bar:
    """A bar that is drawn again twice a second."""

    def __init__(self, label: str, total: int, done: int = 0, *, shown: bool = True):
        self._bar: tqdm[Any] = tqdm(
            total=total, initial=done, desc=label, mininterval=0.5, disable=not shown
        )
        self._facts: dict[str, str] = {}

    def advance(self, metrics: Mapping[str, float] | None = None) -> None:
        """Move it by one step; when it is drawn it shows the loss."""
        if self._bar.update():
            self._bar.set_postfix(self._facts | show_loss(metrics or {}))

    def note(self, facts: Mapping[str, str]) -> None:
        """Write the facts behind it."""
        self._facts = dict(facts)
        self._bar.set_postfix(self._facts)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()


class Lines:
    """Writes a line every 30 seconds and one at the end.

    In a pipe or a file nothing can be drawn again.
    """

    def __init__(self, label: str, total: int, done: int = 0):
        self._label, self._total = label, total
        self._begun = self._done = done
        self._facts: dict[str, str] = {}
        self._metrics: Mapping[str, float] = {}
        self._start = self._last = time.monotonic()

    def advance(self, metrics: Mapping[str, float] | None = None) -> None:
        """Write a line if it is time."""
        self._done += 1
        self._metrics = metrics or {}
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._write()

    def note(self, facts: Mapping[str, str]) -> None:
        """Add the facts to the lines that follow."""
        self._facts = dict(facts)

    def close(self) -> None:
        """Write the last line."""
        self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        passed = self._last - self._start
        pace = f", {(self._done - self._begun) / passed:.3g} steps/s" if passed > 0 else ""
        facts = show_loss(self._metrics) | self._facts
        text = "".join(f", {name} {value}" for name, value in facts.items())
        print(
            f"{self._label}: step {self._done} of {self._total}, {passed:.0f} s{pace}{text}",
            file=sys.stderr,
            flush=True,
        )
