"""Scalable meta-learning: the mixed product, preconditioned by the inner optimizer's own update."""

from __future__ import annotations

from dataclasses import dataclass

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

    D is the derivative of the update that the optimizer would make next, w + u(g, s, w), at the
    gradient g and the state s of the end: bias correction, clipping, schedules and whatever a
    learned optimizer computes are in it. Its transpose is applied, by one vjp, so D need not be
    diagonal. For SGD D = -lr; for Adam it is the derivative through both moments.

    **Bias**: D stands for -H^-1, so the error is [d grad_w L]' (D' + H^-1) v, and that of the
    difference: see `FiniteDifference`.
    This is the derivative of one step of the optimizer. Differentiable again, with the same bias.

    Args:
        radius: Euclidean length of the displacement, of all parameters together.

    Raises:
        ValueError: `radius` is not positive; on the way back: parameters in half precision.

    Cost:
        The loop without a graph, three gradients, and a vjp of the update: for an elementwise one,
        if nobody differentiates the result, a pass over the parameters; see `Optimizer.diagonal`.

    Reference:
        Choe, Mehta, Ahn, Neiswanger, Xie, Strubell, Xing 2023, arXiv:2310.05674, section 3. They
        give D in closed form for diagonal optimizers, and displace by their radius over |D v| as
        well.
    """

    looks_around = True

    radius: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self, "radius", self.radius)

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
        params, state, batch = end
        grads, loss, aux = loop.gradient(loop.inputs, params, state, batch)
        if loop.precondition is not None and is_unrecorded():
            return loop.precondition(loop.inputs, cotangent, grads, state, params, loss)

        def after(grads: Tree) -> Tree:
            with any_order():
                return loop.update(loop.inputs, grads, state, params, loss, aux)[0]

        (x,) = pull_back(after, (grads,), cotangent, (True,))
        return x
