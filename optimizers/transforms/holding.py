"""Optimizers that have memory of their own and hold another optimizer."""

from __future__ import annotations

from torch import Tensor

from metaopt.optimizer import Optimizer, State, Value
from metaopt.optimizer.missing import separate_state
from metaopt.optimizer.state import refuse_state, require_state
from metaopt.optimizer.step import start
from metaopt.tree import Tree

from .transform import check_optimizer


class Holding(Optimizer):
    """An optimizer in front of another that has memory too, so that the state holds two.

    What it remembers itself is where an optimizer has it; the whole state of the inner one is under
    "optimizer".
    """

    def __init__(self, optimizer: Optimizer):
        super().__init__()
        self.optimizer = check_optimizer(self, optimizer)

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        own = start(self, params)
        state = {**own, "optimizer": self.optimizer.init(params, per_parameter=per_parameter)}
        return self.separate(state, params) if per_parameter else state

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        inner = self._inner(state)
        own = {kind: part for kind, part in state.items() if kind != "optimizer"}
        own = separate_state(self, own, params)
        return {**own, "optimizer": self.optimizer.separate(inner, params)}

    def evaluated(self, state: State, params: Tree) -> Tree:
        """Return what the inner optimizer says; see `Optimizer.evaluated`."""
        return self.optimizer.evaluated(self._inner(state), params)

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does.

        Names of the inner optimizer are led by "optimizer.".
        """
        inner = self._inner(state)
        own = super().values(state, loss=loss, grads=grads, params=params)
        behind = self.optimizer.values(inner, loss=loss, grads=grads, params=params)
        return own | {f"optimizer.{name}": value for name, value in behind.items()}

    def _inner(self, state: State) -> State:
        """Return the state of the inner optimizer.

        Raises:
            ValueError: it is not the state of such an optimizer.
        """
        require_state(self, state)
        if "optimizer" not in state:
            refuse_state(self, ', with that of another under "optimizer"', sorted(state))
        inner: State = state["optimizer"]
        return inner
