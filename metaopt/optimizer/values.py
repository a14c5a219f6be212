"""The values of an optimizer's hyperparameters: at a step, and for whoever only looks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt import tree
from metaopt.optimizer.by_name import Ask, ByName, Spread, Value
from metaopt.optimizer.names import paths
from metaopt.optimizer.schedule import Schedule, advance, read
from metaopt.optimizer.state import Hyper, Leaves, State, check_names, require_state
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer

Observe = Callable[[], tuple[Tree, Tensor | None]]  # -> (gradients, loss) at the present parameters


def find_schedules(optimizer: Optimizer) -> dict[str, Schedule | ByName]:
    """Return name -> schedule or `ByName`."""
    values = _get_stored(optimizer).items()
    return {name: value for name, value in values if isinstance(value, Schedule | ByName)}


def _get_stored(optimizer: Optimizer) -> Hyper:
    """Return the hyperparameters as the optimizer has them."""
    return {name: getattr(optimizer, name) for name in optimizer.hyperparameters}


def advance_schedules(
    optimizer: Optimizer,
    state: State,
    leaves: Sequence[Tensor | None],
    loss: Tensor | None,
    grads: Tree,
) -> tuple[Hyper, dict[str, Any]]:
    """Return the hyperparameters' values at this step, and the schedules' next states.

    Args:
        optimizer: the optimizer.
        state: its state.
        leaves: the gradients, one tensor per parameter, or None.
        loss: the loss, if the caller of the optimizer gave it.
        grads: the tree of the gradients, for their names.

    Raises:
        ValueError: the schedules of the state are others, or a tensor does not fit the parameters.
    """

    def ask(schedule: Schedule, before: Any, seen: Leaves | None) -> tuple[Value, Any]:
        if not seen:  # nobody takes its value at this step, and it has nothing to see
            return 0.0, before
        return advance(schedule, before, step=state["step"], loss=loss, grads=seen)

    hyper, schedules = _evaluate(optimizer, state, leaves, grads, ask)
    for value in hyper.values():
        if type(value) is Spread or (isinstance(value, Tensor) and value.ndim):
            check_shapes(optimizer, hyper, leaves)
            break
    return hyper, schedules


def read_values(
    optimizer: Optimizer, state: State, loss: Tensor | None, grads: Tree | None
) -> dict[str, Value]:
    """Return name -> value at the next step from `state`; see `Optimizer.values`."""
    require_state(optimizer, state)
    leaves = None if grads is None else tree.leaves(grads)
    if leaves is not None:
        leaves = [None if leaf is None else tree.as_real(leaf) for leaf in leaves]
    known = tree.leaves((state["slots"], state["shared"])) if leaves is None else leaves
    floating = (
        leaf.dtype for leaf in known if isinstance(leaf, Tensor) and leaf.is_floating_point()
    )
    dtype = next(floating, torch.get_default_dtype())
    like = torch.full((), math.nan, dtype=dtype, device=state["step"].device)

    def ask(schedule: Schedule, before: Any, seen: Leaves | None) -> tuple[Value, Any]:
        step, grads = state["step"], seen or None
        return read(schedule, before, step=step, loss=loss, grads=grads, like=like), before

    found: dict[str, Value] = {}
    for name, value in _evaluate(optimizer, state, leaves, grads, ask)[0].items():
        if type(value) is Spread:
            found |= {f"{pattern}/{name}": one for pattern, one in value.values.items()}
        else:
            found[name] = value
    return found


def _evaluate(
    optimizer: Optimizer,
    state: State,
    leaves: Sequence[Tensor | None] | None,
    grads: Tree | None,
    ask: Ask,
) -> tuple[Hyper, dict[str, Any]]:
    """Return the hyperparameters' values, and what `ask` says are the schedules' next states."""
    hyper = _get_stored(optimizer)
    schedules = {}
    for name, value in hyper.items():
        # most are floats, and to see that is faster than to ask for two classes
        if type(value) is float or not isinstance(value, Schedule | ByName):
            continue
        if name not in state["schedules"]:
            check_schedule_names(optimizer, state)
        before = state["schedules"][name]
        if isinstance(value, Schedule):
            seen = None if leaves is None else [leaf for leaf in leaves if leaf is not None]
            hyper[name], schedules[name] = ask(value, before, seen)
        else:
            named = None if leaves is None else dict(zip(paths(grads), leaves, strict=True))
            hyper[name], schedules[name] = value.evaluate(optimizer, name, before, named, ask)
    if state["schedules"].keys() != schedules.keys():
        check_schedule_names(optimizer, state)
    return hyper, schedules


def fit_values(optimizer: Optimizer, params: Tree, leaves: Leaves) -> Hyper:
    """Return the hyperparameters, schedules as they are.

    Raises:
        ValueError: the shape of one, or its patterns, do not fit the parameters.
    """
    hyper = _get_stored(optimizer)
    for name, value in hyper.items():
        if isinstance(value, ByName):
            hyper[name] = value.spread(optimizer, name, [*paths(params)])
    check_shapes(optimizer, hyper, leaves)
    return hyper


def check_schedule_names(optimizer: Optimizer, state: State) -> None:
    """Raise ValueError if the state has schedules of other hyperparameters."""
    check_names(optimizer, "schedules", find_schedules(optimizer), state["schedules"])


def check_shapes(
    owner: nn.Module, hyper: Mapping[str, Any], leaves: Sequence[Tensor | None]
) -> None:
    """Raise ValueError if a tensor is neither a scalar nor of its parameters' shape."""
    for name, value in hyper.items():
        for place, leaf in enumerate(leaves):
            one = value.values[value.keys[place]] if type(value) is Spread else value
            if leaf is None or not isinstance(one, Tensor) or _fits(one, leaf):
                continue
            raise ValueError(
                f"{type(owner).__name__}: `{name}` must be a scalar, or have the shape of every "
                f"parameter that it meets, got shape {tuple(one.shape)} for a parameter of shape "
                f"{tuple(leaf.shape)}. A value for each step is `{name}=PerStep(values)`, one for "
                "each of some steps `Piecewise`; one for some parameters is "
                f'`{name}={{"*.bias": 0.01, "*": 0.1}}`, or `Grouped`; one for each entry of each '
                f"parameter `{name}=PerParameter(params, 0.1)`."
            )


def _fits(value: Tensor, leaf: Tensor) -> bool:
    is_one_number = value.numel() == 1 and value.ndim <= leaf.ndim
    return not value.ndim or value.shape == leaf.shape or is_one_number


def find_rate(optimizer: Optimizer, state: State, params: Tree, observe: Observe) -> Value:
    """Return the one `lr` among the present values; see `Optimizer.rate`.

    Raises:
        ValueError: there is not just one, or it is not a scalar.
    """
    looks = any(isinstance(module, Schedule) for module in optimizer.modules())
    grads, loss = observe() if looks else (None, None)
    values = optimizer.values(state, loss=loss, grads=grads, params=params)
    rates = {name: v for name, v in values.items() if name.replace("/", ".").split(".")[-1] == "lr"}
    (value,) = rates.values() if len(rates) == 1 else (None,)
    if value is None or (isinstance(value, Tensor) and value.ndim):
        found = {name: _show(rate) for name, rate in rates.items()}
        raise ValueError(
            f'`scale="lr"` must find one step size in the optimizer, got '
            f"{type(optimizer).__name__} with {found or 'none'}. Give a number: `scale=0.1`."
        )
    return value


def _show(rate: Value) -> Any:
    is_row = isinstance(rate, Tensor) and rate.ndim
    return f"a tensor of shape {tuple(rate.shape)}" if is_row else rate  # type: ignore[union-attr]
