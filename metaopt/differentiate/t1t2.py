"""T1 - T2: the implicit function theorem with the identity for the inverse Hessian."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from metaopt.autodiff.mixed import mixed_product
from metaopt.differentiate.arguments import Scale, check_scale
from metaopt.differentiate.point import End, PointRule, Read, at_end, scale_cotangent
from metaopt.differentiate.protocol import InnerLoop
from metaopt.tree import Tree, map


@dataclass(frozen=True)
class T1T2(PointRule):
    """For a cotangent v on the last parameters: -scale [d grad_w L]' v to what the loss reads.

    The derivative of one step of gradient descent with step size `scale`, taken where the loop
    ended. Only this response is scaled, not what the outer loss reads directly.

    **Bias**: x = scale v stands for H^-1 v, so the error is [d grad_w L]' (H^-1 - scale I) v. None
    if H = I / scale; the direction
    is good where the eigenvalues of H are alike. Differentiable again: what is then differentiated
    is this formula, with the last parameters' own dependence given by it too.

    Args:
        scale: a positive number; or "lr" for the step size that the inner optimizer would use next,
            schedules included. After one step of plain SGD, "lr" is the derivative of that step,
            but for the mixed product being taken at its end.

    Raises:
        ValueError: `scale` is neither; on the way back: "lr" where the optimizer has no `lr`, or
            not one for all parameters.

    Cost:
        The loop without a graph, one gradient and its derivative; one more gradient for a schedule.

    Reference:
        Luketina, Berglund, Greff, Raiko 2016, arXiv:1511.06727, section 3. They take v and the
        mixed product on successive steps' batches; here both are those of the end.
    """

    scale: Scale = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        check_scale(self, self.scale)

    @property
    def needs_memory(self) -> bool:
        return self.scale == "lr"

    def pull_back(
        self, loop: InnerLoop, end: End, cotangent: Tree, wanted: Read
    ) -> tuple[Read, dict[str, Tensor]]:
        loss, read = at_end(loop, end)
        x = scale_cotangent(self, self.scale, loop, end, cotangent)
        return mixed_product(loss, end.params, read, map(Tensor.neg, x), wanted), {}
