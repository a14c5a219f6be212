"""Parameters without a gradient, which stay as they are, as in `torch.optim`.

Each parameter then counts its own steps, and memory over all parameters is divided among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.optimizer.state import with_inner
from metaopt.tree import Tree

if TYPE_CHECKING:
    from metaopt.optimizer.optimizer import Optimizer
    from metaopt.optimizer.state import State


def require_gradients(grads: Tree) -> None:
    """Raise ValueError if a gradient is None."""
    missing = [path for path, leaf in tree.named_leaves(grads) if leaf is None]
    if missing:
        raise ValueError(
            f"`grads` must hold a gradient for every parameter, got None at {', '.join(missing)}. "
            "Give zeros. Or let a parameter without a gradient stay as it is, with a step count "
            "for each: `optimizer.init(params, per_parameter=True)`."
        )


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


def _divide(
    optimizer: Optimizer, name: str, memory: Tree, like: Sequence[torch.Size]
) -> list[Tensor]:
    """Return the memory over all parameters as one tensor for each, with the shapes in `like`."""
    each = [memory] * len(like) if isinstance(memory, Tensor) else tree.leaves(memory)
    if all(one.shape == shape for one, shape in zip(each, like, strict=True)):
        return each
    if isinstance(memory, Tensor) and memory.ndim:
        widths = [shape[-1] if len(shape) else 0 for shape in like]
        is_row = all(shape[:-1] == memory.shape[:-1] for shape in like)
        if is_row and sum(widths) == memory.shape[-1]:
            return list(torch.split(memory, widths, dim=-1))
    raise ValueError(
        f"{type(optimizer).__name__}: the memory {name!r} over all parameters, of shape "
        f"{tuple(each[0].shape)}, cannot be divided among them, so a parameter without a gradient "
        "cannot be left out. Give it a gradient of zeros, or remember one tensor for each "
        "parameter (a list in `slots`)."
    )


def share_equal(state: State) -> State:
    """Return a state with one tensor in place of equal counts, and of equal shared scalars.

    Their values are read. A state that was read from a file, or moved to another device, has lost
    what `find_parts` goes by.
    """
    state = with_inner(state, share_equal)
    if "steps" not in state:
        return state
    known: dict[Any, Tensor] = {}

    def share(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim:
            return leaf
        return known.setdefault((leaf.device, leaf.dtype, complex(leaf)), leaf)

    return state | {kind: tree.map(share, state[kind]) for kind in ("steps", "shared")}
