"""Updates only where they agree with the gradient."""

from __future__ import annotations

from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Hyperparameter, Optimizer, is_zero_anywhere
from metaopt.optimizer.parts import Part
from metaopt.tree import Tree

from .transform import Call, Transform


class Cautious(Transform):
    """u = m / (mean(m) + eps) u with m = 1 where u points against the gradient, u g < 0, else 0.

    The mean is that over the entries of a tensor, so that u keeps its size. The derivative takes m
    as constant, and is finite. The gradient is that which this optimizer is given. Weight decay
    would be masked too: put it in front, `DecoupledWeightDecay(1e-5, Cautious(Adam(1e-3)))`.

    Args:
        optimizer: what makes the updates.
        eps: of the denominator; 1 / eps bounds how much an update may grow. The authors' program
            has max(mean(m), 1e-3) in place of the sum.

    Raises:
        ValueError: a number that is not positive.

    Reference:
        Liang, Chen, Liu, Liu 2024, arXiv:2411.16085, algorithm 1.
    """

    hyperparameters = ("eps",)
    eps: Hyperparameter

    def __init__(self, optimizer: Optimizer, *, eps: Hyperparameter = 1e-3):
        super().__init__(optimizer, eps=eps)
        if is_zero_anywhere(self.eps):
            raise ValueError(
                "Cautious: `eps` must be positive, got 0.0. Where no entry agrees, 0 would be "
                "divided by it. Write eps=1e-3."
            )

    def _finished(self, call: Call, updates: Tree) -> Tree:
        given, leaves = tree.leaves(call.grads), tree.leaves(updates)
        for part in call.parts:
            pairs = zip(part.take(given), part.take(leaves), strict=True)
            part.put(leaves, [agreeing(g, u, part) for g, u in pairs])
        return tree.with_leaves(call.grads, leaves)


def agreeing(grad: Tensor, update: Tensor, part: Part) -> Tensor:
    """Return the update where it points against the gradient, and larger in turn."""
    g, u = tree.as_real(grad), tree.as_real(update)
    mask = (g.sign() * u.sign() < 0).to(u.dtype)  # a product may be too small for half precision
    kept = u * (mask / (mask.mean() + part.hyper["eps"]))
    return tree.as_complex(kept) if update.is_complex() else kept.to(update.dtype)
