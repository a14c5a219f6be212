"""The mixed product of T1 - T2 by a finite difference of gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metaopt.autodiff.mixed import mixed_difference
from metaopt.differentiate.base import End, InnerLoop, PointRule, at_end, check_positive
from metaopt.tree import Tree


@dataclass(frozen=True)
class FiniteDifference(PointRule):
    """For a cotangent v on the last parameters: -(G(w + e v) - G(w - e v)) / 2e with G = grad_inputs L and e = radius / |v|.

    Both sides see the same random numbers (one dropout mask), and nothing is changed: not the parameters, not the user's module,
    not the generators.

    **Bias**: that of x = v for H^-1 v, as in `T1T2`, and radius^2 |v| / 6 times the third derivative of G along v / |v|. Rounding
    adds about eps |v| (|G| + |w| |dG/dw|) / radius: with numbers of order 1 the sum is least near radius 0.005 in float32 and near
    1e-5 in float64. Differentiable again, with the same bias; that asks for second derivatives of the loss.

    Args:
        radius: Euclidean length of the displacement, of all parameters together.

    Raises:
        ValueError: `radius` is not positive; on the way back: parameters in half precision.

    Cost:
        The loop without a graph, and two gradients; memory as for a gradient.

    Reference:
        Liu, Simonyan, Yang 2019, arXiv:1806.09055, equation 8, with their radius.
    """

    radius: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self, "radius", self.radius)

    def pull_back(self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Tree) -> tuple[Tree, dict[str, Tensor]]:
        loss, read = at_end(loop, end)
        return mixed_difference(loss, end.params, read, cotangent, wanted, self.radius, sign=-1), {}
