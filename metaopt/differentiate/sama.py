"""Scalable meta-learning: the mixed product, preconditioned by the inner optimizer's own update."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from metaopt.autodiff.mixed import mixed_difference
from metaopt.autodiff.pullback import pull_back
from metaopt.autodiff.replay import drawn_again
from metaopt.checks import check_positive
from metaopt.differentiate.point import End, PointRule, Read, at_end
from metaopt.differentiate.protocol import InnerLoop
from metaopt.exact_ops import any_order
from metaopt.transforms import is_unrecorded
from metaopt.tree import Tree


@dataclass(frozen=True)
class SAMA(PointRule):
    """For a cotangent v: [d grad_w L]' D' v with D = d(update)/d(gradient).

    The cotangent is that of the last parameters; the mixed product is taken by differences.

    D is the derivative of an update of the optimizer, w + u(g, s, w), at a gradient g and a state
    s: bias correction, clipping, schedules and all that a learned optimizer computes are in it. Its
    transpose is applied, so D need not be diagonal. For SGD D = -lr; for Adam it is the derivative
    through both moments.

    **Bias**: D stands for -H^-1, so the error is [d grad_w L]' (D' + H^-1) v, and that of the
    difference: see `FiniteDifference`.
    With the next update, this is the derivative of one more step of the optimizer. Differentiable
    again, with the same bias.

    Args:
        radius: Euclidean length of the displacement, of all parameters together.
        at: which update: "next", the one that would be made at the end, whose gradient has to be
            taken; or "last", the one that led there, whose gradient is known. Where no step was
            made, as in `LevelGraph.hypergradient`, there is only the next.

    Raises:
        ValueError: `radius` is not positive, or `at` something else; on the way back: parameters in
            half precision.

    Cost:
        The loop without a graph, two gradients at displaced parameters, with "next" one at the end,
        and a vjp of the update: for an elementwise one, if the result is not differentiated, a pass
        over the parameters; see `Optimizer.diagonal`. With "last", what the step went from and its
        gradient are kept, the loop is not compiled by itself, and the gradient is taken again where
        the result is differentiated again, of a random loss with other numbers than the step drew.

    Reference:
        Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing 2023, arXiv:2310.05674, section 3. They
        give D in closed form for diagonal optimizers, at the gradient of the last step, and
        displace by their radius over |D v| as well.
    """

    looks_around = True

    radius: float = 0.01
    at: Literal["next", "last"] = field(default="next", kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "radius", self.radius)
        if self.at not in ("next", "last"):
            raise ValueError(f'SAMA: `at` must be "next" or "last", got {self.at!r}.')

    @property
    def looks_back(self) -> bool:  # type: ignore[override]
        return self.at == "last"

    @property
    def needs_memory(self) -> bool:
        return self.at == "next"

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        with drawn_again(end):
            x = self.precondition(loop, end, cotangent)
        loss, read = at_end(loop, end)
        difference = mixed_difference(
            loss, end.params, read, x, wanted, self.radius, is_random=loop.is_random
        )
        return difference, {}

    def precondition(self, loop: InnerLoop, end: End, cotangent: Tree) -> Tree:
        """Return D' v."""
        params, state, batch, _ = end
        last = end.last if self.looks_back else None  # a rule beside this one may look back
        if last is not None:
            params, state, grads, loss, aux = last
        if last is None or not is_unrecorded():  # the gradient moves with what is differentiated
            grads, loss, aux = loop.gradient(loop.inputs, params, state, batch)
        if loop.precondition is not None and is_unrecorded():
            return loop.precondition(loop.inputs, cotangent, grads, state, params, loss)

        def after(grads: Tree) -> Tree:
            with any_order():
                return loop.update(loop.inputs, grads, state, params, loss, aux)[0]

        (x,) = pull_back(after, (grads,), cotangent, (True,))
        return x
