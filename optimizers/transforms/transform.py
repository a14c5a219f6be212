"""What a gradient transform is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from metaopt import tree
from metaopt.optimizer import Hyper, Leaves, Optimizer, State
from metaopt.optimizer.cells import change_in_cells, take
from metaopt.optimizer.hyperparameter import Hyperparameter, Value, set_hyperparameter
from metaopt.optimizer.per_parameter import require_gradients
from metaopt.optimizer.schedule import Schedule
from metaopt.tree import Structure, Tree


class Transform(Optimizer):
    """An optimizer in front of another: it changes the gradients on the way in, or the updates on
    the way out.

    A subclass names its own `hyperparameters` and defines `before` or `after`. The state is that of
    the inner optimizer, with the states of its schedules under "optimizer" and of this one's beside
    it. Deployed with `as_torch`, the hyperparameters of the outermost are options of a group, and
    so is a factor `lr` on the updates, 1 at the start.
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

    def init(self, params: Tree, *, per_parameter: bool = False) -> State:
        """Return the state before the first step."""
        state = self.optimizer.init(params, per_parameter=per_parameter)
        like = tree.as_real(tree.leaves(params)[0])
        self._fit_hyperparameters(params, [tree.as_real(leaf) for leaf in tree.leaves(params)])
        own = {name: schedule.init(like) for name, schedule in self._schedules()}
        return {**state, "schedules": {"optimizer": state["schedules"], **own}}

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        return {
            **self.optimizer.separate(self._split(state)[0], params),
            "schedules": state["schedules"],
        }

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        self._check_state_keys(state)
        leaves, structure = tree.flatten(grads)
        there = [place for place, leaf in enumerate(leaves) if leaf is not None]
        if len(there) < len(leaves) and "steps" not in state:
            require_gradients(grads)
        if not there:
            return grads, {**state, "step": state["step"] + 1}
        inner, outer = self._split(state)
        weights = _real(structure, params, there)
        gradients, hyper, own = self._hyper_there(outer, leaves, there, loss, grads)
        changed = _in_places(change_in_cells(self.before, gradients, weights, hyper), leaves, there)
        moved, after = self.optimizer(tree.unflatten(structure, changed), inner, params, loss=loss)
        moved = tree.leaves(moved)
        updates = change_in_cells(
            self.after, [tree.as_real(moved[place]) for place in there], weights, hyper
        )
        return tree.unflatten(structure, _in_places(updates, leaves, there)), {
            **after,
            "schedules": {"optimizer": after["schedules"], **own},
        }

    def values(
        self,
        state: State,
        *,
        loss: Tensor | None = None,
        grads: Tree | None = None,
        params: Tree | None = None,
    ) -> dict[str, Value]:
        """Return name -> value, as `Optimizer.values` does;

        names of the inner optimizer are led by "optimizer.".
        """
        self._check_state_keys(state)
        inner, outer = self._split(state)
        own = super().values(outer, loss=loss, grads=grads, params=params)
        if grads is not None and any(
            isinstance(module, Schedule) for module in self.optimizer.modules()
        ):
            # else there is nothing exact for the inner one to see
            is_known = loss is not None or not outer["schedules"]
            grads = self._change(outer, grads, params, loss) if is_known else None
        behind = self.optimizer.values(inner, loss=loss, grads=grads, params=params)
        return own | {f"optimizer.{name}": value for name, value in behind.items()}

    def _hyper_there(
        self, state: State, leaves: list[Any], there: list[int], loss: Tensor | None, grads: Tree
    ) -> tuple[Leaves, Hyper, dict[str, Any]]:
        """Return (the gradients that are there, their hyperparameters, the next states of
        schedules).
        """
        real = {place: tree.as_real(leaves[place]) for place in there}
        hyper, schedules = self._hyper_at(
            state, [real.get(place) for place in range(len(leaves))], loss, grads
        )
        return [*real.values()], take(hyper, there), schedules

    def _change(self, state: State, grads: Tree, params: Tree | None, loss: Tensor | None) -> Tree:
        """Return the gradients that the inner optimizer sees."""
        leaves, structure = tree.flatten(grads)
        there = [place for place, leaf in enumerate(leaves) if leaf is not None]
        gradients, hyper, _ = self._hyper_there(state, leaves, there, loss, grads)
        changed = change_in_cells(self.before, gradients, _real(structure, params, there), hyper)
        return tree.unflatten(structure, _in_places(changed, leaves, there))

    def _split(self, state: State) -> tuple[State, State]:
        """Return (the state of the inner optimizer, the state with this one's own schedules).

        Raises:
            ValueError: it is the state of no transform.
        """
        schedules = dict(state["schedules"])
        if "optimizer" not in schedules:
            raise ValueError(
                f"`state` must be that of this {type(self).__name__}, with the schedules "
                f"['optimizer', ...], got {sorted(schedules)}. Pass what its own `init`, or the "
                f"step before, returned."
            )
        return {**state, "schedules": schedules.pop("optimizer")}, {**state, "schedules": schedules}


def _real(structure: Structure, params: Tree | None, there: list[int]) -> Leaves | None:
    """Return the parameters in some places, complex ones as real."""
    if params is None:
        return None
    given = tree.flatten_like(structure, params, "params")
    return [tree.as_real(given[place]) for place in there]


def _in_places(tensors: Leaves, leaves: list[Any], there: list[int]) -> list[Any]:
    """Return the tensors in their places among the leaves, as complex where the leaf is; None
    elsewhere.
    """
    placed: list[Any] = [None] * len(leaves)
    for place, tensor in zip(there, tensors, strict=True):
        placed[place] = tree.as_complex(tensor) if leaves[place].is_complex() else tensor
    return placed


def checked(owner: Optimizer, optimizer: Any) -> Optimizer:
    """Return `optimizer`.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(owner).__name__}: `optimizer` must be a metaopt Optimizer, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}. Use one from "
            f"`metaopt.optimizers`, for example "
            "`metaopt.optimizers.SGD(lr=0.1)`."
        )
    return optimizer
