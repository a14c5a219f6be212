"""Optimizers that keep other parameters beside those that they move."""

from __future__ import annotations

from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Leaves, Optimizer, Slots, State, Value, require_params
from metaopt.optimizer.step import step_leaves
from metaopt.tree import Tree

from ..moving import zeros
from ..scalars import scalar_dtype
from .holding import Holding


class Beside(Holding):
    """An optimizer that keeps parameters a = w + offset beside the parameters w that it moves.

    The memory is the offset, which is 0 at first, so that the derivative in the initial parameters
    is exact. It is kept in float32 at least: in half precision an average that moves by a
    thousandth would stay where it is. A subclass defines `update`, to which the updates of the
    inner optimizer are given in place of gradients, so its own schedules observe these.

    The parameters must move as this optimizer says, so what stands in front of it may change
    gradients, not updates.
    """

    follows_params = True

    def slots(self, params: Leaves) -> Slots:
        return zeros([p.to(scalar_dtype(p)) for p in params], "offset")

    def share(self) -> Value:
        """Return s, where w + s offset are the parameters to evaluate at."""
        return 1.0

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        inner = self._inner(state)
        updates, inner = self.optimizer(grads, inner, params, loss=loss)
        updates, own = step_leaves(self, self.update, updates, state, params, loss)
        return updates, {**own, "optimizer": inner}

    def evaluated(self, state: State, params: Tree) -> Tree:
        """Return w + s offset; see `Optimizer.evaluated`."""
        self._inner(state)
        offsets = tree.leaves_like(params, state["slots"]["offset"], "state['slots']['offset']")
        rows = zip(tree.leaves(params), offsets, strict=True)
        return tree.with_leaves(params, [self._evaluated(w, offset) for w, offset in rows])

    def _evaluated(self, param: Tensor, offset: Tensor) -> Tensor:
        moved = tree.as_real(param) + self.share() * offset
        return (tree.as_complex(moved) if param.is_complex() else moved).to(param.dtype)


def moves(owner: Optimizer, updates: Leaves, params: Leaves | None) -> Leaves:
    """Return (w + u) - w: how far parameters really move, which are rounded after the update.

    Raises:
        ValueError: the parameters were not given.
    """
    weights = require_params(owner, params, "it keeps others beside them")
    wide = [w.to(scalar_dtype(w)) for w in weights]
    rows = zip(weights, updates, wide, strict=True)
    return [(w + u).to(w.dtype).to(before.dtype) - before for w, u, before in rows]
