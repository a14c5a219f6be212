"""What an optimizer's state holds, and the errors for one that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple, NoReturn

from torch import Tensor, nn

State = dict[str, Any]
Leaves = list[Tensor]  # one tensor per parameter
Slots = dict[str, Any]  # name -> Leaves, or one Tensor over all parameters
Hyper = dict[str, Any]  # name -> number or tensor; where it differs by name, a `Spread`


class Arguments(NamedTuple):
    """What `update` and `direction` are called with; see there."""

    grads: Leaves
    params: Leaves | None
    slots: Slots
    hyper: Hyper
    step: Tensor


# *Arguments -> (one tensor per parameter, next slots)
UpdateFn = Callable[..., tuple[Leaves, Slots]]


def find_lists(slots: Slots) -> dict[str, Leaves]:
    """Return the memory that has one tensor for each parameter."""
    return {name: slot for name, slot in slots.items() if isinstance(slot, list)}


STATE_KEYS = frozenset(("step", "slots", "shared", "schedules"))


def require_state(owner: nn.Module, state: Any) -> None:
    """Raise ValueError if it is not a state at all."""
    if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
        found = sorted(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise ValueError(
            f"`state` must be a dict with {sorted(STATE_KEYS)}, got {found}. Pass what `init` of "
            f"this {type(owner).__name__}, or the step before, returned."
        )


def refuse_state(owner: nn.Module, expected: str, found: object) -> NoReturn:
    """Raise ValueError: the state is another optimizer's."""
    raise ValueError(
        f"`state` must be that of this {type(owner).__name__}{expected}, got {found}. Pass what "
        "its own `init`, or the step before, returned."
    )


def with_inner(state: State, change: Callable[[State], State]) -> State:
    """Return the state with `change` of those of other optimizers that it holds.

    They are under "optimizer", of a group by the patterns.
    """

    def enter(node: dict[str, Any]) -> dict[str, Any]:
        if node.keys() >= STATE_KEYS:
            return change(node)
        return {pattern: enter(part) for pattern, part in node.items()}

    return state | {"optimizer": enter(state["optimizer"])} if "optimizer" in state else state


def check_names(owner: nn.Module, what: str, own: Collection[str], names: Collection[str]) -> None:
    """Raise ValueError if `what` has other names in the state than its owner has."""
    if set(names) != set(own):
        refuse_state(owner, f", with the {what} {sorted(own)}", sorted(names))


def check_memory(owner: nn.Module, memory: Slots, own: Slots) -> None:
    """Raise ValueError if the memory has other names or shapes than the owner's `own`."""
    check_names(owner, "memory", own, memory)
    for name, slot in own.items():
        pairs = zip(_row(slot), _row(memory[name]), strict=False)
        for shape, found in ((tuple(one.shape), tuple(other.shape)) for one, other in pairs):
            if shape != found:
                expected = f" for these parameters, with the memory {name!r} of shape {shape}"
                refuse_state(owner, expected, found)


def _row(slot: Any) -> Leaves:
    return slot if isinstance(slot, list) else [slot]
