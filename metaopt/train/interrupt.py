"""A signal to stop that waits until a step is over."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupt(AbstractContextManager["Interrupt"]):
    """While entered, the first signal to stop is kept in mind; a second one acts as without this.

    In a thread that is not the main one Python delivers no signals, and nothing is done.

    Args:
        leave: called with the name of a signal that comes while nobody waits; it raises.

    Attributes:
        received: the name of the signal, None until one comes.
        is_awaited: whether somebody will look at `received` before long.
    """

    def __init__(self, leave: Callable[[str], object]) -> None:
        self.received: str | None = None
        self.is_awaited = True
        self._leave = leave
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            # one that is ignored, as in the background of a shell, stays ignored
            heard = [one for one in SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]
            self._before = {one: signal.signal(one, self._keep) for one in heard}
        return self

    def _keep(self, number: int, frame: object) -> None:
        self.received = signal.Signals(number).name
        self._restore()
        if not self.is_awaited:
            self._leave(self.received)

    def _restore(self) -> None:
        while self._before:
            one, handler = self._before.popitem()
            signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()
