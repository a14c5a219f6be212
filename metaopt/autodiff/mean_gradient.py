"""The gradient of a loss that is a mean over examples, and the derivative of that gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.forward import slope_along
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.pullback import choose, plus, pull_back, put, spread
from metaopt.compiled import compile_whole
from metaopt.tree import Tree

Hvp = Literal["reverse", "forward"]


@dataclass(frozen=True)
class MeanGradient:
    """(g, L, aux) with g = grad_w L(inputs, w, state, batch), from m micro-batches.

    L is their mean, (L_1 + ... + L_m) / m.

    Attributes:
        loss: (inputs, params, state, batch) -> (L, aux); L is a mean over the examples, and aux
            empty, if m > 1.
        examples: a tree of bools like (inputs, params, state, batch): which leaves have the
            examples as their leading axis. Needed if m > 1.
        microbatches: m, the number of equal parts these are cut into, one after the other.
        hvp: how the gradient is differentiated: "reverse" over reverse, or "forward" over reverse.
        compile: whether what one micro-batch needs is compiled.
    """

    loss: Callable[[Tree, Tree, Tree, Tree], tuple[Tensor, Tree]]
    examples: Tree = None
    microbatches: int = 1
    hvp: Hvp = "reverse"
    compile: bool = False

    def __call__(
        self, inputs: Tree, params: Tree, state: Tree, batch: Tree
    ) -> tuple[Tree, Tensor, Tree]:
        """Return (g, L, aux)."""
        of_one = compile_whole(self._of_one) if self.compile else self._of_one
        first, *rest = self._parts((inputs, params, state, batch))
        total = of_one(*first)
        for part in rest:
            total = tree.map(torch.add, total, of_one(*part))
        return total if self.microbatches == 1 else tree.map(self._share, total)

    def pull_back(
        self, arguments: Tree, cotangents: tuple[Tree, Tensor | None, Tree], wanted: Tree
    ) -> Tree:
        """Return the cotangents of (inputs, params, state, batch): d<c, g> + a dL + d<b, aux>.

        Here c is the cotangent of g, a that of L, and b that of aux.

        Args:
            arguments: (inputs, params, state, batch).
            cotangents: (c, a, b); None stands for zero.
            wanted: in the structure of the arguments: whether a leaf's cotangent is asked for.

        Returns:
            A tuple of trees like the arguments, with None for what is not wanted.

        Cost:
            Two to three gradients in time; in memory what one micro-batch needs.
        """
        cotangents = tree.map(self._share, cotangents)
        of_grads, _, of_aux = cotangents
        nothing_along = all(bar is None for bar in tree.leaves(of_grads))
        is_reverse = (
            self.hvp == "reverse"
            or nothing_along
            or any(bar is not None for bar in tree.leaves(of_aux))
        )
        of_one = self._pull_back_reverse if is_reverse else self._pull_back_forward
        of_one = compile_whole(of_one) if self.compile else of_one
        first, *rest = self._parts(arguments)
        total = of_one(first, cotangents, wanted)
        for part in rest:
            total = tree.map(_merge, total, of_one(part, cotangents, wanted), self.examples)
        return total

    def _parts(self, arguments: Tree) -> Iterator[Tree]:
        """Yield the arguments of each micro-batch."""
        if self.microbatches == 1:
            yield arguments
            return
        for i in range(self.microbatches):
            yield tree.map(
                lambda leaf, is_one, i=i: self._part(leaf, i) if is_one else leaf,
                arguments,
                self.examples,
            )

    def _part(self, examples: Tensor, i: int) -> Tensor:
        size, rest = divmod(len(examples), self.microbatches)
        if rest:
            raise ValueError(
                f"`microbatches` must divide the number of examples of every batch, got "
                f"{self.microbatches} for {len(examples)}. "
                "Leave out the incomplete batch, for example with `DataLoader(..., "
                "drop_last=True)`."
            )
        return examples.narrow(0, i * size, size)

    def _share(self, total: Tensor | None) -> Tensor | None:
        return None if total is None else total / self.microbatches

    def _of_one(
        self, inputs: Tree, params: Tree, state: Tree, batch: Tree
    ) -> tuple[Tree, Tensor, Tree]:
        grads, loss, aux = gradient(lambda at: self.loss(inputs, at, state, batch), params)
        if self.microbatches > 1 and tree.leaves(aux):
            raise ValueError(
                f"`microbatches={self.microbatches}` needs a loss that is a mean over examples and "
                f"nothing else, but this one "
                "also returns buffers or aux, or runs the levels below, which cannot be averaged. "
                "Leave `microbatches` out."
            )
        return grads, loss, aux

    def _pull_back_reverse(
        self, arguments: Tree, cotangents: tuple[Tree, Tensor | None, Tree], wanted: Tree
    ) -> Tree:
        return pull_back(self._of_one, arguments, cotangents, wanted)

    def _pull_back_forward(
        self, arguments: Tree, cotangents: tuple[Tree, Tensor | None, Tree], wanted: Tree
    ) -> Tree:
        """Return d/de F(w + e c) + a F for F = dL/dv, for the wanted v: one derivative along c."""
        inputs, params, state, batch = here = arguments
        along, of_loss, _ = cotangents

        def slopes_at(at: Tree) -> list[Tensor]:
            there = (inputs, at, state, batch)
            slope = torch.func.grad(lambda variables: self.loss(*put(variables, there, wanted))[0])
            return slope(choose(there, wanted))  # type: ignore[no-any-return]

        slopes, bars = slope_along(
            slopes_at, params, along, asked='`hvp="forward"`', instead='`hvp="reverse"`'
        )
        if of_loss is not None:
            bars = [bar + of_loss * slope for bar, slope in zip(bars, slopes, strict=True)]
        return spread(bars, here, wanted)


def _merge(one: Tensor | None, other: Tensor | None, is_example: bool) -> Tensor | None:
    """Join the cotangents of two micro-batches: side by side for examples, else as a sum."""
    return (
        torch.cat((one, other))
        if is_example and one is not None and other is not None
        else plus(one, other)
    )
