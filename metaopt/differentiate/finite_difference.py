"""The mixed product of T1 - T2 by a finite difference of gradients."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from metaopt.autodiff.mixed import mixed_difference
from metaopt.checks import check_positive
from metaopt.differentiate.arguments import Scale, check_scale
from metaopt.differentiate.point import End, PointRule, Read, at_end, scale_cotangent
from metaopt.differentiate.protocol import InnerLoop
from metaopt.tree import Tree


@dataclass(frozen=True)
class FiniteDifference(PointRule):
    """For a cotangent v: -scale (G(w + e v) - G(w - e v)) / 2e, G = grad_inputs L.

    The cotangent is that of the last parameters w, and e = radius / |v|.

    DARTS' second term, of which `scale` is the step size xi: the derivative of one step of gradient
    descent, the mixed product taken where the loop ended. Only this response is scaled, not what
    the outer loss reads directly.

    Both sides see the same random numbers (one dropout mask), and nothing is changed: not the
    parameters, not the user's module, not the generators.

    **Bias**: that of x = scale v for H^-1 v, as in `T1T2`, and radius^2 |x| / 6 times the third
    derivative of G along v / |v|.
    Rounding adds about eps |x| (|G| + |w| |dG/dw|) / radius: with numbers of order 1 the sum is
    least near radius 0.005 in float32 and near 1e-5 in float64. Differentiable again, with the same
    bias; that asks for second derivatives of the loss.

    Args:
        radius: Euclidean length of the displacement, of all parameters together.
        scale: xi, a positive number; or "lr" for the step size that the inner optimizer would use
            next, schedules included, as in DARTS.

    Raises:
        ValueError: `radius` is not positive, or `scale` neither that nor "lr"; on the way back:
            parameters in half precision, or "lr" where the optimizer has no `lr`, or not one for
            all parameters.

    Cost:
        The loop without a graph, and two gradients, three with "lr" and a schedule; memory as for a
        gradient.

    Reference:
        Liu, Simonyan, Yang 2019, arXiv:1806.09055, equations 7 and 8, with their radius. They take
        the mixed product before the step, at the parameters that it starts from; here it is where
        it ended.
    """

    looks_around = True

    radius: float = 0.01
    scale: Scale = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_positive(self, "radius", self.radius)
        check_scale(self, self.scale)

    @property
    def needs_memory(self) -> bool:
        return self.scale == "lr"

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        loss, read = at_end(loop, end)
        x = scale_cotangent(self, self.scale, loop, end, cotangent)
        difference = mixed_difference(
            loss, end.params, read, x, wanted, self.radius, sign=-1, is_random=loop.is_random
        )
        return difference, {}
