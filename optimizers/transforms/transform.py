"""What a gradient transform is."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from metaopt import tree
from metaopt.autodiff.pullback import pull_back
from metaopt.optimizer import (
    Hyper,
    Hyperparameter,
    Leaves,
    Optimizer,
    State,
    Value,
    set_hyperparameter,
)
from metaopt.optimizer.parts import Part, change_in_parts, find_parts
from metaopt.optimizer.schedule import Schedule
from metaopt.optimizer.state import refuse_state, require_state
from metaopt.optimizer.step import find_present
from metaopt.optimizer.values import advance_schedules, find_schedules, fit_values
from metaopt.torch_internals import has_forward_hooks
from metaopt.tree import Tree


class Transform(Optimizer):
    """An optimizer in front of another, which changes the gradients or the updates.

    The gradients are changed on the way in, the updates on the way out: a subclass names its own
    `hyperparameters` and defines `before` or `after`; the latter not in front of an `EMA` and its
    like, which would lose track of the parameters. The state is that of the inner optimizer,
    with the states of its schedules under "optimizer" and of this one's beside it. Deployed with
    `as_torch`, the hyperparameters of the outermost are options of a group, and so is a factor `lr`
    on the updates, 1 at the start.
    """

    def __init__(self, optimizer: Optimizer, **hyperparameters: Hyperparameter):
        super().__init__()
        self.optimizer = check_optimizer(self, optimizer)
        kind = type(self)
        if kind.after is not Transform.after or kind._finished is not Transform._finished:
            refuse_to_change(self, optimizer)
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
        leaves = [tree.as_real(leaf) for leaf in tree.leaves(params)]
        fit_values(self, params, leaves)
        own = {name: one.init(leaves[0]) for name, one in find_schedules(self).items()}
        return {**state, "schedules": {"optimizer": state["schedules"], **own}}

    def separate(self, state: State, params: Tree) -> State:
        """Return the state with a step count for each parameter, as `Optimizer.separate` does."""
        inner, _ = self._split(state)
        return {**self.optimizer.separate(inner, params), "schedules": state["schedules"]}

    def forward(
        self, grads: Tree, state: State, params: Tree | None = None, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (updates, next state), as `Optimizer.forward` does."""
        require_state(self, state)
        if not find_present(tree.leaves(grads), grads, state):
            return grads, {**state, "step": state["step"] + 1}
        inner, outer = self._split(state)
        call = self._enter(grads, outer, params, loss)
        updates, after = self.optimizer(self._observed(call), inner, params, loss=loss)
        schedules = {"optimizer": after["schedules"], **call.schedules}
        return self._finished(call, updates), {**after, "schedules": schedules}

    def moved(
        self, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None
    ) -> tuple[Tree, State]:
        """Return (w + u, next state), in one pass where the inner optimizer can."""
        if not self._is_in_front or not find_present(tree.leaves(grads), grads, state):
            return super().moved(grads, state, params, loss=loss)
        inner, outer = self._split(state)
        call = self._enter(grads, outer, params, loss)
        moved, after = self.optimizer.moved(self._observed(call), inner, params, loss=loss)
        return moved, {**after, "schedules": {"optimizer": after["schedules"], **call.schedules}}

    def precondition(
        self, v: Tree, grads: Tree, state: State, params: Tree, *, loss: Tensor | None = None
    ) -> Tree:
        """Return D' v, with that of the inner optimizer; see `Optimizer.precondition`."""
        if not self._is_in_front:
            return super().precondition(v, grads, state, params, loss=loss)
        inner, outer = self._split(state)

        def observe(grads: Tree) -> Tree:
            return self._observed(self._enter(grads, outer, params, loss))

        x = self.optimizer.precondition(v, observe(grads), inner, params, loss=loss)
        return pull_back(observe, (grads,), x, (True,))[0]

    @property
    def _is_in_front(self) -> bool:
        """Whether it changes the gradients alone, and nothing else is to happen in a call."""
        kind = type(self)
        changes = (kind.forward, kind.after, kind._finished)
        own = (Transform.forward, Transform.after, Transform._finished)
        return changes == own and "forward" not in vars(self) and not has_forward_hooks(self)

    def evaluated(self, state: State, params: Tree) -> Tree:
        """Return what the inner optimizer says; see `Optimizer.evaluated`."""
        require_state(self, state)
        return self.optimizer.evaluated(self._split(state)[0], params)

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
        require_state(self, state)
        inner, outer = self._split(state)
        own = super().values(outer, loss=loss, grads=grads, params=params)
        observes = any(isinstance(module, Schedule) for module in self.optimizer.modules())
        if grads is not None and observes:
            # else there is nothing exact for the inner one to see
            is_known = loss is not None or not outer["schedules"]
            call = self._enter(grads, outer, params, loss) if is_known else None
            grads = None if call is None else self._observed(call)
        behind = self.optimizer.values(inner, loss=loss, grads=grads, params=params)
        return own | {f"optimizer.{name}": value for name, value in behind.items()}

    def _observed(self, call: Call) -> Tree:
        """Return the gradients that the inner optimizer sees, a tree."""
        return call.change(self.before)

    def _finished(self, call: Call, updates: Tree) -> Tree:
        """Return the updates, given those of the inner optimizer, a tree."""
        return call.change(self.after, updates)

    def _enter(self, grads: Tree, state: State, params: Tree | None, loss: Tensor | None) -> Call:
        """Return what a call on these gradients has to do; `state` has this one's own schedules."""
        gradients = _real(tree.leaves(grads))
        weights = None if params is None else _real(tree.leaves_like(grads, params, "params"))
        hyper, schedules = advance_schedules(self, state, gradients, loss, grads)
        present = find_present(gradients, grads, state)
        return Call(grads, weights, find_parts(hyper, present), schedules)

    def _split(self, state: State) -> tuple[State, State]:
        """Return (the state of the inner optimizer, the state with this one's own schedules).

        Raises:
            ValueError: it is not the state of a transform.
        """
        schedules = dict(state["schedules"])
        if "optimizer" not in schedules:
            expected = ", with the schedules ['optimizer', ...]"
            refuse_state(self, expected, sorted(schedules))
        return {**state, "schedules": schedules.pop("optimizer")}, {**state, "schedules": schedules}


class Call(NamedTuple):
    """One call of a transform.

    Args:
        grads: the gradients, a tree.
        params: the parameters, complex ones as real.
        parts: the parameters with a gradient, by their hyperparameters.
        schedules: the next states of the transform's own schedules.
    """

    grads: Tree
    params: Leaves | None
    parts: list[Part]
    schedules: dict[str, Any]

    def change(self, change: Any, given: Tree = None) -> Tree:
        """Return what a method of the transform makes of a tree, by default the gradients."""
        leaves = tree.leaves(self.grads if given is None else given)
        changed = change_in_parts(change, _real(leaves), self.params, self.parts)
        for place, leaf in enumerate(leaves):
            if leaf is not None and leaf.is_complex():
                changed[place] = tree.as_complex(changed[place])
        return tree.with_leaves(self.grads, changed)


def _real(leaves: list[Any]) -> list[Any]:
    return [None if leaf is None else tree.as_real(leaf) for leaf in leaves]


def refuse_to_change(owner: Optimizer, optimizer: Optimizer) -> None:
    """Raise ValueError if the optimizer's memory follows its own updates, which `owner` changes."""
    for part in optimizer.modules():
        if isinstance(part, Optimizer) and part.follows_params:
            own, kind = type(owner).__name__, type(part).__name__
            raise ValueError(
                f"{own} changes the updates of {kind}, which remembers where they bring the "
                f"parameters. Put it behind: `{kind}(..., {own}(...))`."
            )


def check_optimizer(owner: Optimizer, optimizer: Any) -> Optimizer:
    """Return `optimizer`.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"{type(owner).__name__}: `optimizer` must be a metaopt Optimizer, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}. Use one from "
            "`metaopt.optimizers`, for example `metaopt.optimizers.SGD(lr=0.1)`."
        )
    return optimizer
