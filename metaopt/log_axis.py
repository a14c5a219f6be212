"""Numbers on a logarithmic axis that one can read."""

from __future__ import annotations

from typing import Any

WIDE = 200.0  # ratio of the ends from which decades say enough


def label_plainly(axis: Any) -> None:
    """Write short numbers at 1, 2 and 5 of each decade of a logarithmic axis of matplotlib.

    By itself matplotlib writes powers, and over few decades it labels all numbers from 1 to 9,
    which overlap above 5. Call it when everything is drawn: it looks at the ends. Where there are
    fewer than two such numbers between them, matplotlib chooses others.
    """
    low, high = sorted(axis.get_view_interval())  # it may be inverted
    axis.get_major_locator().set_params(subs=(1, 2, 5) if high < WIDE * low else (1,))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
