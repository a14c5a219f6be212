"""The gradient of a loss that is a mean over examples, and the derivative of that gradient."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from metaopt import tree
from metaopt.compiled import compiled
from metaopt.kernels import any_order
from metaopt.pullback import chosen, plus, pull_back, put
from metaopt.tree import Tree

Hvp = Literal["reverse", "forward"]


@dataclass(frozen=True)
class MeanGradient:
    """(g, L) with g = grad_w L(inputs, w, batch), from micro-batches: L = (L_1 + ... + L_m) / m.

    Attributes:
        loss: (inputs, params, batch) -> L; a mean over the examples if m > 1.
        examples: a tree of bools like (inputs, params, batch): which leaves have the examples as their leading axis.
        microbatches: m, the number of equal parts these are cut into, one after the other.
        hvp: how the gradient is differentiated: "reverse" over reverse, or "forward" over reverse.
        compile: whether what one micro-batch needs is compiled.
    """

    loss: Callable[[Tree, Tree, Tree], Tensor]
    examples: Tree
    microbatches: int = 1
    hvp: Hvp = "reverse"
    compile: bool = False

    def __call__(self, inputs: Tree, params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        """Return (g, L)."""
        of_one = compiled(self._of_one) if self.compile else self._of_one
        first, *rest = self._parts((inputs, params, batch))
        total = of_one(*first)
        for part in rest:
            total = tree.map(torch.add, total, of_one(*part))
        return total if self.microbatches == 1 else tree.map(self._share, total)

    def pull_back(self, arguments: Tree, cotangents: tuple[Tree, Tensor | None], wanted: Tree) -> Tree:
        """Return the cotangents of (inputs, params, batch), given c on g and a on L: d<c, g> + a dL.

        Args:
            arguments: (inputs, params, batch).
            cotangents: (c, a); None stands for zero.
            wanted: in the structure of the arguments: whether a leaf's cotangent is asked for.

        Returns:
            A tuple of trees like the arguments, with None for what is not wanted.

        Cost:
            Two to three gradients in time; in memory what one micro-batch needs.
        """
        cotangents = tree.map(self._share, cotangents)
        is_constant = all(bar is None for bar in tree.leaves(cotangents[0]))
        of_one = self._pull_back_reverse if self.hvp == "reverse" or is_constant else self._pull_back_forward
        of_one = compiled(of_one) if self.compile else of_one
        first, *rest = self._parts(arguments)
        with _named_operator():
            total = of_one(first, cotangents, wanted)
            for part in rest:
                total = tree.map(_merge, total, of_one(part, cotangents, wanted), self.examples)
        return total

    def _parts(self, arguments: Tree) -> Iterator[Tree]:
        """Yield the arguments of each micro-batch."""
        for i in range(self.microbatches):
            yield tree.map(lambda leaf, is_one, i=i: self._part(leaf, i) if is_one else leaf, arguments, self.examples)

    def _part(self, examples: Tensor, i: int) -> Tensor:
        if self.microbatches == 1:
            return examples
        size, rest = divmod(len(examples), self.microbatches)
        if rest:
            raise ValueError(
                f"`microbatches` must divide the number of examples of every batch, got {self.microbatches} for {len(examples)}. "
                "Leave out the incomplete batch, for example with `DataLoader(..., drop_last=True)`."
            )
        return examples.narrow(0, i * size, size)

    def _share(self, total: Tensor | None) -> Tensor | None:
        return None if total is None else total / self.microbatches

    def _of_one(self, inputs: Tree, params: Tree, batch: Tree) -> tuple[Tree, Tensor]:
        with any_order():
            return torch.func.grad_and_value(lambda at: self.loss(inputs, at, batch))(params)

    def _pull_back_reverse(self, arguments: Tree, cotangents: tuple[Tree, Tensor | None], wanted: Tree) -> Tree:
        return pull_back(self._of_one, arguments, cotangents, wanted)

    def _pull_back_forward(self, arguments: Tree, cotangents: tuple[Tree, Tensor | None], wanted: Tree) -> Tree:
        """One derivative along c: with F = dL/dv at w, the result is d/de F(w + e c) + a F, for the wanted v."""
        inputs, params, batch = arguments
        along, of_loss = cotangents

        def gradient(at: Tree) -> list[Tensor]:
            here = (inputs, at, batch)
            return torch.func.grad(lambda variables: self.loss(*put(variables, here, wanted)))(chosen(here, wanted))

        with any_order():
            slopes, bars, *_ = torch.func.jvp(gradient, (params,), (along,))
        if of_loss is not None:
            bars = [bar + of_loss * slope for bar, slope in zip(bars, slopes, strict=True)]
        return put(bars, tree.map(lambda _: None, wanted), wanted)


@contextmanager
def _named_operator() -> Iterator[None]:
    """Say what to do where torch has no forward derivative of an operator."""
    try:
        yield
    except NotImplementedError as error:
        name = re.search(r"forward AD with (\S+)", str(error))
        if name is None:
            raise
        raise ValueError(
            f'`hvp="forward"` needs the forward derivative of every operator in the loss and its gradient, got `{name[1]}`, '
            'which has none in torch. Use `hvp="reverse"`.'
        ) from error


def _merge(one: Tensor | None, other: Tensor | None, is_example: bool) -> Tensor | None:
    """Join the cotangents of two micro-batches: side by side for examples, as a sum for what both read."""
    return torch.cat((one, other)) if is_example and one is not None and other is not None else plus(one, other)
