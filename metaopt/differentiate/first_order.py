"""First-order differentiation of the inner loop: inner gradients are constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from metaopt.autodiff.gradient import constant_gradient
from metaopt.differentiate.protocol import InnerLoop, Inputs, Result
from metaopt.differentiate.steps import StepsRule, unroll
from metaopt.scan import Memory, check_memory
from metaopt.tree import Tree


@dataclass(frozen=True)
class FirstOrder(StepsRule):
    """The derivative of the loop with all that the optimizer observes held constant.

    It observes gradients and losses.

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

    def attach(self, loop: InnerLoop) -> Result:
        """Return the result of the steps, with the graph of everything but gradients."""

        def update(
            inputs: Inputs, grads: Tree, state: Any, params: Tree, loss: Tensor, aux: Tree
        ) -> tuple[Tree, Any]:
            return loop.update(inputs, grads, state, params, loss.detach(), aux)

        return unroll(replace(loop, update=update), self.memory, constant_gradient)
