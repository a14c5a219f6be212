"""T1 - T2: the implicit function theorem with the identity for the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from metaopt.autodiff.mixed import mixed_product
from metaopt.differentiate.base import End, InnerLoop, PointRule, at_end
from metaopt.tree import Tree, map


@dataclass(frozen=True)
class T1T2(PointRule):
    """For a cotangent v on the last parameters: -[d grad_w L]' v to what the loss reads.

    The derivative in one step of gradient descent with step size 1, taken where the loop ended; for another step size, scale.

    **Bias**: x = v stands for H^-1 v, so the error is [d grad_w L]' (H^-1 - I) v. None if H = I; the direction is good where the
    eigenvalues of H are alike. Differentiable again: what is then differentiated is this formula, with the last parameters'
    own dependence given by it too.

    Cost:
        The loop without a graph, one gradient and its derivative.

    Reference:
        Luketina, Berglund, Greff, Raiko 2016, arXiv:1511.06727, section 3. They take v and the mixed product on successive steps'
        batches; here both are those of the end.
    """

    def pull_back(self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Tree) -> tuple[Tree, dict[str, Tensor]]:
        loss, read = at_end(loop, end)
        return mixed_product(loss, end.params, read, map(Tensor.neg, cotangent), wanted), {}
