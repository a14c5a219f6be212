"""Labels of a logarithmic axis are plain numbers that do not overlap."""

from __future__ import annotations

import itertools

import pytest

from metaopt.log_axis import label_plainly


@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        ((0.06, 3.0), ["0.1", "0.2", "0.5", "1", "2"]),
        ((1.5, 25.0), ["2", "5", "10", "20"]),
        ((0.31, 0.48), None),  # matplotlib's choice
        ((1000.0, 1e-4), None),  # inverted
        ((1e-4, 1.0), ["0.0001", "0.001", "0.01", "0.1", "1"]),
        ((1e-9, 1e6), None),
    ],
)
def test_labels_are_plain_and_apart(ends: tuple[float, float], labels: list[str] | None) -> None:
    figure_of = pytest.importorskip("matplotlib.figure").Figure
    axes = figure_of(figsize=(4, 3), layout="constrained").subplots()
    axes.set(yscale="log", ylim=ends)
    label_plainly(axes.yaxis)
    axes.figure.canvas.draw()
    at = [*axes.yaxis.get_majorticklabels(), *axes.yaxis.get_minorticklabels()]
    low, high = min(ends) * (1 - 1e-9), max(ends) * (1 + 1e-9)
    shown = [one for one in at if one.get_text() and low <= one.get_position()[1] <= high]
    found = [one.get_text().replace("\N{MINUS SIGN}", "-") for one in shown]
    assert len(found) >= 2
    assert labels is None or found == labels
    assert [float(text) for text in found] == pytest.approx(
        [one.get_position()[1] for one in shown]
    )
    boxes = sorted((one.get_window_extent().y0, one.get_window_extent().y1) for one in shown)
    assert all(below[1] < above[0] for below, above in itertools.pairwise(boxes))
