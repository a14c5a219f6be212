"""A function of rows that is evaluated, and pulled back at every order, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from metaopt.exact_ops.recomputed import Function, pullback_of


@dataclass(frozen=True)
class InParts:
    """A function for `recomputed` whose intermediate results are those of one part at a time.

    So are those of its pullbacks: they are functions of rows too.

    Attributes:
        part: the function of the part which begins with this row; it returns a tuple.
        rows: in each part.
        cut: of each argument, whether it is cut into parts, along its last axis but one; if not,
            every part gets the whole.
        joined: of each result, whether the parts are put together in the same way; if not, their
            sum is meant.
    """

    part: Callable[[int], Function]
    rows: int
    cut: Sequence[bool]
    joined: Sequence[bool]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = next(x.shape[-2] for x, is_cut in zip(tensors, self.cut, strict=True) if is_cut)
        whole: list[Tensor] = []
        for first in range(0, count, self.rows):
            here = slice(first, first + self.rows)
            given = (
                x[..., here, :] if is_cut else x
                for x, is_cut in zip(tensors, self.cut, strict=True)
            )
            found = self.part(first)(*given)
            if not whole:
                whole = [
                    x.new_empty(*x.shape[:-2], count, x.shape[-1]) if is_joined else x.clone()
                    for x, is_joined in zip(found, self.joined, strict=True)
                ]
            for total, x, is_joined in zip(whole, found, self.joined, strict=True):
                if is_joined:
                    total[..., here, :] = x
                elif first:
                    total += x
        return tuple(whole)

    def pullback(self, wanted: Sequence[bool]) -> InParts:
        """Return the function of (arguments, cotangents) which returns the wanted cotangents."""
        joined = [is_cut for is_cut, is_wanted in zip(self.cut, wanted, strict=True) if is_wanted]
        return InParts(
            lambda first: pullback_of(self.part(first), wanted),
            self.rows,
            (*self.cut, *self.joined),
            joined,
        )
