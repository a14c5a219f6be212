"""The implicit derivative from gradients alone, by tilting the inner problem."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt.autodiff.gradient import gradient
from metaopt.autodiff.mixed import map_same_noise
from metaopt.autodiff.pullback import choose, put, spread
from metaopt.checks import check_count, check_positive
from metaopt.differentiate.point import End, PointRule, Read, at_end
from metaopt.differentiate.protocol import InnerLoop
from metaopt.tree import Tree


@dataclass(frozen=True)
class Penalty(PointRule):
    """For a cotangent v: weight (grad_inputs L(z) - grad_inputs L(w)), z a minimum of a tilted L.

    The cotangent is that of the last parameters w.

    F2SA minimises f + weight L, f the outer loss. At the end of a loop only v = grad f is known, so
    f is taken to be linear, and the inner problem is tilted: z minimises L(z) + <v / weight - grad
    L(w), z>, where the second term makes w itself the minimum for v = 0, converged or not. From
    grad L(z) = grad L(w) - v / weight follows z - w = -H^-1 v / weight + O(1 / weight^2), so the
    result is -[d grad_w L]' H^-1 v as in `Implicit`, without a second derivative. z is found by
    gradient descent from w.

    **Bias**: O(1 / weight), |H^-1 v|^2 / (2 weight) times the third derivatives of L, zero if L is
    quadratic; and what the descent
    leaves, a factor (1 - lr mu)^steps in directions of curvature mu. Rounding adds weight eps |grad
    L|: in float32 keep the weight below 1e4. Differentiable again, through the steps of the
    descent.

    Args:
        weight: of the inner loss against the outer.
        steps: of gradient descent.
        lr: its step size, below 2 / (largest curvature).

    Raises:
        ValueError: a number that is not positive; under `compile=True`, whose gradients could not
            see the same random numbers.

    Cost:
        The loop without a graph, and steps + 1 gradients; one more copy of the parameters.

    Reference:
        Kwon, Kwon, Wright, Nowak 2023, arXiv:2301.10945, lemma 3.1 for the bias. They keep f as it
        is, and track the minimum without it by a second copy, for which w and the tilt by grad L(w)
        stand here.
    """

    looks_around = True

    weight: float = 100.0
    steps: int = 20
    lr: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self, "weight", self.weight)
        check_positive(self, "lr", self.lr)
        check_count(self, "steps", self.steps)

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        if torch.compiler.is_compiling():
            raise ValueError(
                "Penalty cannot be compiled: its gradients must see the same random numbers, which "
                "a compiler cannot wind back. Leave `compile` out, or use `Implicit` or "
                "`FiniteDifference`."
            )
        loss, read = at_end(loop, end)

        def slopes(w: Tree) -> tuple[Tree, list[Tensor]]:
            """Return (grad_w L, grad_inputs L)."""

            def value(at: tuple[Tree, list[Tensor]]) -> tuple[Tensor, Tree]:
                w, variables = at
                return loss(w, put(variables, read, wanted)), ()

            return gradient(value, (w, choose(read, wanted)))[0]  # type: ignore[no-any-return]

        w = end.params
        ((at_w, of_w),) = map_same_noise(slopes, [w])
        tilt = tree.map(lambda v, g: v / self.weight - g, cotangent, at_w)
        z = tree.map(lambda w, v: w - self.lr * v / self.weight, w, cotangent)
        for _ in range(self.steps - 1):
            ((at_z, _),) = map_same_noise(slopes, [z])
            z = tree.map(lambda z, g, tilt: z - self.lr * (g + tilt), z, at_z, tilt)
        ((at_z, of_z),) = map_same_noise(slopes, [z])
        left = tree.norm(tree.map(torch.add, at_z, tilt)) * self.weight
        size = tree.norm(cotangent)
        bars = [self.weight * (after - before) for after, before in zip(of_z, of_w, strict=True)]
        return spread(bars, read, wanted), {"residual": left / torch.where(size > 0, size, 1)}
