"""A step count for each parameter, so that one without a gradient stays, as in `torch.optim`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer.cells import take
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer, State


def separate_state(optimizer: Optimizer, state: State, params: Tree) -> State:
    """Return the state with "steps", a count for each parameter, and shared memory divided.

    Raises:
        ValueError: that memory is neither the same for any parameters nor divided among them along
            its last axis.
    """
    if "steps" in state:
        return state
    shared = {}
    if state["shared"]:
        alone = [optimizer.slots([tree.as_real(leaf.detach())]) for leaf in tree.leaves(params)]
        for name, memory in state["shared"].items():
            like = [slots[name].shape for slots in alone]
            shared[name] = tree.with_leaves(params, _divide(optimizer, name, memory, like))
    return {**state, "shared": shared, "steps": tree.map(lambda _: state["step"], params)}


def step_apart(
    optimizer: Optimizer,
    step_on: Callable[..., Any],
    grads: Tree,
    state: State,
    params: Tree | None,
    loss: Tensor | None,
) -> tuple[Tree, State]:
    """Return what `Optimizer._on_leaves` does, each parameter at its own step; None without
    gradient.

    A schedule is that of all parameters: its step counts the calls, and it observes the gradients
    that there are.
    """
    gradients = tree.leaves(grads)
    there = [place for place, gradient in enumerate(gradients) if gradient is not None]
    step = state["step"] + 1
    if not there:
        return grads, {**state, "step": step}
    counts = tree.leaves_like(grads, state["steps"], "state['steps']")
    weights = None if params is None else tree.leaves_like(grads, params, "params")
    memory = {
        kind: {
            name: [*tree.leaves_like(grads, slot, f"state[{kind!r}][{name!r}]")]
            for name, slot in state[kind].items()
        }
        for kind in ("slots", "shared")
    }
    observed = [None if gradient is None else tree.as_real(gradient) for gradient in gradients]
    hyper, schedules = optimizer._hyper_at(state, observed, loss, grads)
    results: list[Tensor | None] = [None] * len(gradients)
    counts = [*counts]
    for part in _find_parts(there, counts, memory["shared"]):
        before = {
            "step": counts[part[0]],
            "slots": {
                name: [slot[place] for place in part] for name, slot in memory["slots"].items()
            },
            "shared": {name: each[part[0]] for name, each in memory["shared"].items()},
            "schedules": state["schedules"],
        }
        own = None if weights is None else [weights[place] for place in part]
        shared = take(hyper, part)
        moved, after = optimizer._on_leaves(
            step_on, [gradients[place] for place in part], before, own, loss, shared
        )
        for index, place in enumerate(part):
            results[place], counts[place] = moved[index], after["step"]
            for name, slot in after["slots"].items():
                memory["slots"][name][place] = slot[index]
            for name, own_memory in after["shared"].items():
                memory["shared"][name][place] = own_memory
    kept = {
        kind: {name: tree.with_leaves(grads, each) for name, each in named.items()}
        for kind, named in memory.items()
    }
    return tree.with_leaves(grads, results), {
        "step": step,
        **kept,
        "schedules": schedules,
        "steps": tree.with_leaves(grads, counts),
    }


def require_gradients(grads: Tree) -> None:
    """Raise ValueError if a gradient is None."""
    if all(leaf is not None for leaf in tree.leaves(grads)):
        return
    missing = [path for path, leaf in tree.named_leaves(grads) if leaf is None]
    raise ValueError(
        f"`grads` must hold a gradient for every parameter, got None at {', '.join(missing)}. Give "
        f"zeros. Or "
        "let a parameter without a gradient stay as it is, with a step count for each: "
        "`optimizer.init(params, per_parameter=True)`."
    )


def share_equal(state: State) -> State:
    """Return a state with one tensor in place of equal counts, and of equal scalars in shared
    memory.

    Their values are read. A state that was read from a file, or moved to another device, has lost
    what `_find_parts` goes by.
    """
    if "steps" not in state:
        return state
    known: dict[Any, Tensor] = {}

    def share(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim:
            return leaf
        return known.setdefault((leaf.device, leaf.dtype, complex(leaf)), leaf)

    return {
        **state,
        "steps": tree.map(share, state["steps"]),
        "shared": tree.map(share, state["shared"]),
    }


def _find_parts(
    there: Sequence[int], counts: Sequence[Tensor], shared: dict[str, list[Tensor]]
) -> list[list[int]]:
    """Return the places in parts that can make their step together, in one call on lists.

    The values of the counts may be batched or traced, so they are not read. Parameters that made
    every step together have the very same tensor as their count, however: `separate_state` begins
    with one, and a part's next count is one again.
    """
    # a compiler does not see which tensor is which, and joins the operations itself
    if torch.compiler.is_compiling():
        return [[place] for place in there]
    parts: dict[tuple[int, ...], list[int]] = {}
    for place in there:
        history = (counts[place], *(each[place] for each in shared.values()))
        parts.setdefault(tuple(map(id, history)), []).append(place)
    return list(parts.values())


def _divide(
    optimizer: Optimizer, name: str, memory: Tensor, like: Sequence[torch.Size]
) -> list[Tensor]:
    """Return the memory over all parameters as one tensor for each, with the shapes in `like`."""
    if all(shape == memory.shape for shape in like):
        return [memory] * len(like)
    widths = [shape[-1] if len(shape) else 0 for shape in like]
    if (
        memory.ndim
        and all(shape[:-1] == memory.shape[:-1] for shape in like)
        and sum(widths) == memory.shape[-1]
    ):
        return list(memory.split(widths, dim=-1))
    raise ValueError(
        f"{type(optimizer).__name__}: the memory {name!r} over all parameters, of shape "
        f"{tuple(memory.shape)}, cannot be divided among them, so a parameter without a gradient "
        f"cannot be "
        "left out. Give it a gradient of zeros, or remember one tensor for each parameter (a list "
        "in `slots`)."
    )
