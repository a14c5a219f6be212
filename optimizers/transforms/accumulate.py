"""One step for the gradients of several calls."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from metaopt import tree
from metaopt.checks import check_count
from metaopt.optimizer import Hyper, Leaves, Optimizer, Slots, State, Value
from metaopt.optimizer.step import step_leaves
from metaopt.tree import Tree

from ..moving import zeros
from ..scalars import scalar_dtype
from .holding import Holding


class Accumulate(Holding):
    """Every k-th call steps on the mean of the last k gradients; other calls have updates of 0.

    The inner optimizer counts its own steps, and its memory stands still between. It sees the mean
    of the k losses. Its update is computed in every call, since the count is a tensor, and left out
    through `torch.where`.

    Args:
        every: k, in calls.
        optimizer: what makes a step of the mean.

    Raises:
        ValueError: `every` is not a positive integer, the loss is no scalar, or (in `init` and
            `separate`) steps are to be counted for each parameter.

    Cost:
        One copy of the parameters; an update of the inner optimizer in every call.
    """

    def __init__(self, every: int, optimizer: Optimizer):
        super().__init__(optimizer)
        self.every = check_count(self, "every", every)

    def steps_inside(self, steps: int) -> int:
        """Return the number of steps of the inner optimizer in this many calls."""
        return max(1, steps // self.every)

    def slots(self, params: Leaves) -> Slots:
        like = params[0]
        loss = torch.zeros((), dtype=scalar_dtype(like), device=like.device)
        return zeros(params, "sum") | {"loss": loss}

    def update(
        self, grads: Leaves, params: Leaves | None, slots: Slots, hyper: Hyper, step: Tensor
    ) -> tuple[Leaves, Slots]:
        sums = [total + g for total, g in zip(slots["sum"], grads, strict=True)]
        now = self._now(step)
        means = [total / self.every for total in sums]
        return means, {**slots, "sum": [torch.where(now, 0, total) for total in sums]}

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        before = self._inner(state)
        means, own = step_leaves(self, self.update, grads, state, params, loss)
        now, mean = self._now(own["step"]), None
        if loss is not None:
            if isinstance(loss, Tensor) and loss.ndim:
                raise ValueError(
                    f"Accumulate: `loss` must be a scalar, got shape {tuple(loss.shape)}. Take the "
                    "mean."
                )
            known = own["shared"]["loss"]
            total = (known + loss).to(known.dtype)
            mean = total / self.every
            own["shared"] = {**own["shared"], "loss": torch.where(now, 0, total)}
        updates, after = self.optimizer(means, before, params, loss=mean)
        kept = tree.map(lambda new, old: torch.where(now, new, old), after, before)
        moved = tree.map(lambda u: torch.where(now, u, 0), updates)
        return moved, {**own, "optimizer": kept}

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does, at the next step of the inner one.

        What that will observe is not known before all its gradients are.
        """
        return super().values(state, params=params)

    def separate(self, state: State, params: Tree) -> NoReturn:
        """Refuse a step count for each parameter.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Accumulate: every parameter needs a gradient in every call, since they make their "
            "steps together. Give zeros, or leave frozen parameters out."
        )

    def _now(self, step: Tensor) -> Tensor:
        return step % self.every == 0
