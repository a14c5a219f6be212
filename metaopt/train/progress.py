"""How far a training is: a bar in a terminal, now and then a line in a file, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


def show_progress(label: str, total: int, *, shown: bool) -> Bar | Lines:
    """Return a bar if stderr is a terminal, else lines; a bar that is not drawn if not `shown`."""
    if shown and not sys.stderr.isatty():
        return Lines(label, total)
    return Bar(label, total, shown=shown)


class Bar:
    """A bar that is drawn again twice a second."""

    def __init__(self, label: str, total: int, *, shown: bool = True):
        self._bar: tqdm[Any] = tqdm(total=total, desc=label, mininterval=0.5, disable=not shown)

    def advance(self) -> None:
        """Move it by one step."""
        self._bar.update()

    def note(self, facts: Mapping[str, str]) -> None:
        """Write the facts behind it."""
        self._bar.set_postfix(facts)

    def close(self) -> None:
        """Leave it as it is."""
        self._bar.close()


class Lines:
    """Writes a line every 30 seconds and one at the end.

    In a pipe or a file nothing can be drawn again.
    """

    def __init__(self, label: str, total: int):
        self._label, self._total = label, total
        self._done, self._facts = 0, ""
        self._start = self._last = time.monotonic()

    def advance(self) -> None:
        """Write a line if it is time."""
        self._done += 1
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES and self._done < self._total:
            self._write()

    def note(self, facts: Mapping[str, str]) -> None:
        """Add the facts to the lines that follow."""
        self._facts = "".join(f", {name} {value}" for name, value in facts.items())

    def close(self) -> None:
        """Write the last line."""
        self._write()

    def _write(self) -> None:
        self._last = time.monotonic()
        passed = self._last - self._start
        pace = f", {self._done / passed:.3g} steps/s" if passed > 0 else ""
        print(
            f"{self._label}: step {self._done} of {self._total}, {passed:.0f} s{pace}{self._facts}",
            file=sys.stderr,
            flush=True,
        )
