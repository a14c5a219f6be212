"""One step: what stands between trees of parameters and an `update` on lists of real tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import DisableTorchFunction, Tensor

from metaopt import tree
from metaopt.checks import check_differentiable
from metaopt.optimizer.apply import check_gradients
from metaopt.optimizer.flat import call_joined
from metaopt.optimizer.missing import require_gradients
from metaopt.optimizer.parts import find_parts, is_divided
from metaopt.optimizer.state import (
    Arguments,
    Leaves,
    Slots,
    State,
    UpdateFn,
    check_memory,
    require_state,
)
from metaopt.optimizer.values import advance_schedules, find_schedules, fit_values
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer


def start(optimizer: Optimizer, params: Tree) -> State:
    """Return the state before the first step; see `Optimizer.init`."""
    check_differentiable(None, "params", tree.named_leaves(params))
    leaves = [tree.as_real(leaf.detach()) for leaf in tree.leaves(params)]
    if not leaves:
        raise ValueError(
            "`params` must hold at least one tensor, got an empty tree. Is every parameter frozen?"
        )
    hyper = fit_values(optimizer, params, leaves)
    slots: dict[str, list[Any]] = {}
    shared: dict[str, list[Any]] = {}
    for part in find_parts(hyper, range(len(leaves))):
        for name, slot in optimizer.slots(part.take(leaves)).items():
            rows, each = (slots, slot) if isinstance(slot, list) else (shared, part.repeat(slot))
            part.put(rows.setdefault(name, [None] * len(leaves)), each)
    schedules = find_schedules(optimizer).items()
    return {
        "step": torch.zeros((), dtype=torch.int64, device=leaves[0].device),
        "slots": {name: tree.with_leaves(params, row) for name, row in slots.items()},
        "shared": {
            name: tree.with_leaves(params, row) if is_divided(hyper) else row[0]
            for name, row in shared.items()
        },
        "schedules": {name: schedule.init(leaves[0]) for name, schedule in schedules},
    }


def find_present(gradients: Sequence[Tensor | None], grads: Tree, state: State) -> Sequence[int]:
    """Return the places of the parameters with a gradient; `grads` is the gradients' tree.

    Raises:
        ValueError: one has none, and the state does not count the steps of each.
    """
    if type(None) not in map(type, gradients):
        return range(len(gradients))
    if "steps" not in state:
        require_gradients(grads)
    return [place for place, gradient in enumerate(gradients) if gradient is not None]


def step_leaves(
    optimizer: Optimizer,
    update_fn: UpdateFn,
    grads: Tree,
    state: State,
    params: Tree | None,
    loss: Tensor | None,
) -> tuple[Tree, State]:
    """Return what `update_fn` returns, as a tree like the gradients, and the next state.

    A schedule is that of all parameters: its step counts the calls, and it observes the gradients
    that there are.
    """
    require_state(optimizer, state)
    gradients = tree.leaves(grads)
    weights = None if params is None else tree.leaves_like(grads, params, "params")
    present = find_present(gradients, grads, state)
    if not present:
        return grads, {**state, "step": state["step"] + 1}
    with DisableTorchFunction():  # under a mode every look at a dtype is a call of its own
        complex_places = [place for place in present if gradients[place].is_complex()]
    if complex_places:
        gradients = [None if one is None else tree.as_real(one) for one in gradients]
        weights = None if weights is None else [tree.as_real(weight) for weight in weights]
    if weights is not None:
        check_gradients(gradients, weights, grads)
    hyper, schedules = advance_schedules(optimizer, state, gradients, loss, grads)
    slots, step = read_memory(state, "slots", grads), state["step"] + 1
    if "steps" in state or is_divided(hyper):
        given = Arguments(gradients, weights, slots, hyper, step)
        results, shared, counts = _step_in_parts(optimizer, update_fn, given, state, grads, present)
    else:
        given = Arguments(gradients, weights, slots | state["shared"], hyper, step)
        results, slots = _call(optimizer, update_fn, given)
        shared, counts = {name: slots.pop(name) for name in state["shared"]}, {}
    if complex_places:
        results = [*results]
        for place in complex_places:
            results[place] = tree.as_complex(results[place])
    return tree.with_leaves(grads, results), {
        "step": step,
        "slots": {name: tree.with_leaves(grads, slot) for name, slot in slots.items()},
        "shared": shared,
        "schedules": schedules,
        **counts,
    }


def _step_in_parts(
    optimizer: Optimizer,
    update_fn: UpdateFn,
    given: Arguments,
    state: State,
    grads: Tree,
    present: Sequence[int],
) -> tuple[list[Any], dict[str, Tree], dict[str, Tree]]:
    """Return (one tensor per parameter, or None, the shared memory, {"steps": the counts}).

    `update_fn` is called once for each part of the parameters with a gradient. The memory in
    `given` becomes that after the step.
    """
    # begins as the gradients, of which those that are absent stay None
    results = [*given.grads]
    counts, history = [state["step"]] * len(given.grads), []
    shared = read_memory(state, "shared", grads)
    if "steps" in state:
        counts = [*tree.leaves_like(grads, state["steps"], "state['steps']")]
        history = [counts, *shared.values()]
    for part in find_parts(given.hyper, present, history):
        first = part.places[0]
        slots = {name: part.take(row) for name, row in given.slots.items()}
        slots |= {name: row[first] for name, row in shared.items()}
        params = None if given.params is None else part.take(given.params)
        own = Arguments(part.take(given.grads), params, slots, part.hyper, counts[first] + 1)
        moved, after = _call(optimizer, update_fn, own)
        part.put(results, moved)
        part.put(counts, part.repeat(own.step))
        for name, row in given.slots.items():
            part.put(row, after[name])
        for name, row in shared.items():
            part.put(row, part.repeat(after[name]))
    steps = {"steps": tree.with_leaves(grads, counts)} if "steps" in state else {}
    return results, {name: tree.with_leaves(grads, row) for name, row in shared.items()}, steps


def read_memory(state: State, kind: str, grads: Tree) -> dict[str, list[Any]]:
    """Return name -> one tensor per parameter, of a kind of memory."""
    return {
        name: tree.leaves_like(grads, slot, f"state[{kind!r}][{name!r}]")
        for name, slot in state[kind].items()
    }


def _call(optimizer: Optimizer, update_fn: UpdateFn, given: Arguments) -> tuple[Leaves, Slots]:
    """Return (one tensor per parameter, next slots); see that they are what they should be."""
    kind, slots, count = type(optimizer).__name__, given.slots, len(given.grads)
    try:
        results, after = call_joined(optimizer, update_fn, given)
    except (KeyError, RuntimeError):
        check_memory(optimizer, slots, optimizer.slots(given.grads))
        raise
    if after.keys() != slots.keys():
        check_memory(optimizer, slots, optimizer.slots(given.grads))
        raise ValueError(
            f"{kind}: `update` must return the slots {sorted(slots)}, got {sorted(after)}."
        )
    if len(results) != count:
        raise ValueError(
            f"{kind}: `update` must return one tensor per parameter, {count}, got {len(results)}."
        )
    with DisableTorchFunction():
        return results, {n: _fit(optimizer, n, after[n], old) for n, old in slots.items()}


def _fit(optimizer: Optimizer, name: str, new: Any, old: Any) -> Any:
    """Return the memory in its old dtype.

    A 0-dim hyperparameter of a wider dtype would widen the memory of a 0-dim parameter.
    """
    if isinstance(old, list):
        pairs = zip(new, old, strict=True)
        return [
            n if n.shape == o.shape and n.dtype == o.dtype else _fit(optimizer, name, n, o)
            for n, o in pairs
        ]
    if new.shape != old.shape:
        raise ValueError(
            f"{type(optimizer).__name__}: the memory {name!r} of shape {tuple(old.shape)} became "
            f"{tuple(new.shape)}. The state is that of other parameters, or a hyperparameter is a "
            "tensor where the memory is one number."
        )
    return new if new.dtype == old.dtype else new.to(old.dtype)
