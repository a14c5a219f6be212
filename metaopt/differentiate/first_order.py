"""First-order differentiation of the inner loop: inner gradients are constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metaopt.autodiff.gradient import constant_gradient
from metaopt.differentiate.base import InnerLoop, unroll
from metaopt.scan import Memory, check_memory
from metaopt.tree import Tree


@dataclass(frozen=True)
class FirstOrder:
    """The derivative of the loop with everything the optimizer observes (gradients and loss) held
    constant.

    For MAML this is FOMAML; for learned optimizers the classic shortcut of leaving out the
    optimizee's second derivatives. The losses in the result are differentiated as usual. Exact when
    the inner losses are linear; otherwise the error is the left-out product of Hessians, of the
    order of (step size) x (curvature) a step.

    Args:
        memory: as for `Backprop`.

    Cost:
        One gradient and one backward pass of the loss a step; one more gradient for "steps".

    Reference:
        Finn, Abbeel, Levine 2017, arXiv:1703.03400, section 5.2; Andrychowicz et al. 2016,
        arXiv:1606.04474, section 2.
    """

    memory: Memory = "full"

    def __post_init__(self) -> None:
        check_memory(self.memory)

    def __call__(self, loop: InnerLoop) -> tuple[Tree, Any, Tree]:
        def gradient(
            inputs: Tree, params: Tree, state: Any, batch: Tree
        ) -> tuple[Tree, Tensor, Tree]:
            return constant_gradient(
                lambda at: loop.loss(inputs, at, state, batch), params, allow_unused=loop.skips
            )

        def update(
            inputs: Tree, grads: Tree, state: Any, params: Tree, loss: Tensor, aux: Tree
        ) -> tuple[Tree, Any]:
            return loop.update(inputs, grads, state, params, loss.detach(), aux)

        return unroll(replace(loop, update=update), gradient, self.memory)
