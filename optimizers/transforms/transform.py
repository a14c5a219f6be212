"""What a gradient transform is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Hyper, Leaves, Observe, Optimizer, State
from metaopt.optimizer.hyperparameter import Hyperparameter, Value, set_hyperparameter
from metaopt.tree import Tree


class Transform(Optimizer):
    """An optimizer in front of another: it changes the gradients on the way in, or the updates on the way out.

    A subclass names its own `hyperparameters` and defines `before` or `after`. The state is that of the inner optimizer,
    with the states of its schedules under "optimizer" and of this one's beside it. Deployed with `as_torch`, the hyperparameters of
    the outermost are options of a group, and so is a factor `lr` on the updates, 1 at the start.
    """

    def __init__(self, optimizer: Optimizer, **hyperparameters: Hyperparameter):
        super().__init__()
        self.optimizer = checked(self, optimizer)
        for name, value in hyperparameters.items():
            set_hyperparameter(self, name, value)

    def before(self, grads: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        """Return the gradients that the inner optimizer sees."""
        return grads

    def after(self, updates: Leaves, params: Leaves | None, hyper: Hyper) -> Leaves:
        """Return the updates, given those of the inner optimizer."""
        return updates

    def init(self, params: Tree) -> State:
        """Return the state before the first step."""
        state = self.optimizer.init(params)
        like = tree.as_real(tree.leaves(params)[0])
        own = {name: schedule.init(like) for name, schedule in self._schedules()}
        return {**state, "schedules": {"optimizer": state["schedules"], **own}}

    def forward(self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        leaves, structure = tree.flatten(grads)
        gradients = [tree.as_real(leaf) for leaf in leaves]
        weights = None if params is None else [tree.as_real(leaf) for leaf in tree.flatten_like(structure, params, "params")]
        hyper, own = self._hyper_at(state, gradients, loss)
        gradients = _of_their_kind(self.before(gradients, weights, hyper), leaves)
        inner = {**state, "schedules": state["schedules"]["optimizer"]}
        moved, after = self.optimizer(tree.unflatten(structure, gradients), inner, params, loss=loss)
        updates = self.after([tree.as_real(leaf) for leaf in tree.leaves(moved)], weights, hyper)
        return tree.unflatten(structure, _of_their_kind(updates, leaves)), {
            **after,
            "schedules": {"optimizer": after["schedules"], **own},
        }

    def rate(self, state: State, params: Tree, observe: Observe) -> Value:
        """Return the step size of the inner optimizer, as `Optimizer.rate` does."""

        def observed() -> tuple[Tree, Tensor | None]:
            grads, loss = observe()
            leaves, structure = tree.flatten(grads)
            gradients = [tree.as_real(leaf) for leaf in leaves]
            hyper, _ = self._hyper_at(state, gradients, loss)
            seen = self.before(gradients, [tree.as_real(leaf) for leaf in tree.leaves(params)], hyper)
            return tree.unflatten(structure, _of_their_kind(seen, leaves)), loss

        return self.optimizer.rate({**state, "schedules": state["schedules"]["optimizer"]}, params, observed)


def _of_their_kind(tensors: Leaves, leaves: Leaves) -> Leaves:
    """Return as complex what stands for a complex leaf."""
    return [tree.as_complex(tensor) if leaf.is_complex() else tensor for tensor, leaf in zip(tensors, leaves, strict=True)]


def checked(owner: Optimizer, optimizer: Any) -> Optimizer:
    """Return `optimizer`.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(owner).__name__}: `optimizer` must be a metaopt Optimizer, got {type(optimizer).__name__}. "
            "Use one from `optimizers`, for example `optimizers.SGD(lr=0.1)`."
        )
    return optimizer
