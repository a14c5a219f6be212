"""Averages of squared gradients over the rows and the columns of a tensor, as in Adafactor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..moving import mean_along


class Axes(NamedTuple):
    """The two largest axes of a tensor; of equal ones the last.

    Args:
        row: the axis along which rows are counted, the second largest.
        column: the one along which columns are, the largest.
    """

    row: int
    column: int

    def broadcast(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, [n, *their shape], with axes of 1, so that they broadcast to the tensor."""
        return rows.unsqueeze(self.column + 1), columns.unsqueeze(self.row + 1)


def find_axes(shape: Sequence[int]) -> Axes | None:
    """Return the axes of rows and columns, or None for fewer than two axes."""
    if len(shape) < 2:
        return None
    return Axes(*sorted(range(len(shape)), key=shape.__getitem__)[-2:])


def factor_shapes(shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the shapes of the averages over rows and over columns; other axes stay.

    With fewer than two axes there is one average, of each entry.
    """
    axes = find_axes(shape)
    if axes is None:
        return [*shape], [0]
    rows = [size for axis, size in enumerate(shape) if axis != axes.column]
    return rows, [size for axis, size in enumerate(shape) if axis != axes.row]


class Factored(NamedTuple):
    """What the averages of squared gradients of one tensor make.

    Args:
        rows: the averages over rows after this step, [decays, *shape of the rows].
        columns: those over columns.
        for_grad: factors whose product is 1 / sqrt(V) for a gradient; each [decays, ...], where
            ... broadcasts to the shape of the tensor.
        for_momentum: the same for a momentum; None if they are those for a gradient.
    """

    rows: Tensor
    columns: Tensor
    for_grad: tuple[Tensor, ...]
    for_momentum: tuple[Tensor, ...] | None


def factor(grad: Tensor, rows: Tensor, columns: Tensor, forget: Tensor) -> Factored:
    """Return the averages after a step, and the roots of the squares V that they stand for.

    V = R C / mean(R), where R and C are averages over time of the mean of g^2 over each row and
    each column; V = R with fewer than two axes.

    Args:
        grad: g.
        rows: R so far, [decays, *shape of the rows].
        columns: C so far.
        forget: 1 - decay, [decays].

    Reference:
        Shazeer, Stern 2018, arXiv:1804.04235, algorithm 4.
    """
    square, axes = grad * grad + 1e-30, find_axes(grad.shape)
    if axes is None:
        rows = _average(rows, square, forget)
        return Factored(rows, columns, (_safe_rsqrt(rows + 1e-9),), ((rows + 1e-6).rsqrt(),))
    rows = _average(rows, mean_along(square, axes.column), forget)
    columns = _average(columns, mean_along(square, axes.row), forget)
    at = axes.row - (axes.row > axes.column) + 1
    of_rows = _safe_rsqrt(rows / (mean_along(rows, at).unsqueeze(at) + 1e-9))
    roots = axes.broadcast(of_rows, _safe_rsqrt(columns))
    return Factored(rows, columns, roots, None)


def _average(average: Tensor, square: Tensor, forget: Tensor) -> Tensor:
    weight = forget.view(-1, *[1] * square.ndim)
    return torch.lerp(average, square.expand_as(average), weight)


def _safe_rsqrt(x: Tensor) -> Tensor:
    return x.clamp(min=1e-9).rsqrt()
