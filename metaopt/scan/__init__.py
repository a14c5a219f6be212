"""The one differentiable loop, and what it keeps in memory."""

from __future__ import annotations

from metaopt.scan._scan import Memory, check_memory, scan
from metaopt.scan.loop import Step, StepPullback
from metaopt.scan.nesting import plain_loops_inside
from metaopt.scan.revolve import Revolve
from metaopt.scan.stream import Stream

__all__ = [
    "Memory",
    "Revolve",
    "Step",
    "StepPullback",
    "Stream",
    "check_memory",
    "plain_loops_inside",
    "scan",
]
