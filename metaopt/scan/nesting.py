"""Whether a scan runs inside a step of another one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# While one scan runs forward or backward as a Function, scans inside its step run as plain loops: a
# Function inside another one's forward or backward is beyond torch.func. Memory stays bounded,
# since one outer step's graph exists at a time.
_inside_step: ContextVar[bool] = ContextVar("inside_step", default=False)


@contextmanager
def plain_loops_inside() -> Iterator[None]:
    """While entered, scans run as plain loops."""
    token = _inside_step.set(True)
    try:
        yield
    finally:
        _inside_step.reset(token)


def is_inside_step() -> bool:
    """Return True if scans are to run as plain loops."""
    return _inside_step.get()
