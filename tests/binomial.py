"""What binomial checkpointing costs."""

from __future__ import annotations

from math import comb

from metaopt.scan.revolve import repeats


def advances(steps: int, snapshots: int) -> int:
    """Return the number of steps to run without a graph to reverse T: r T - C(s + r, s + 1)."""
    r = repeats(steps, snapshots)
    return r * steps - comb(snapshots + r, snapshots + 1)
