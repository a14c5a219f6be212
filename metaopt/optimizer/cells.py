"""Steps in which some parameters have other hyperparameters than others: those with the same are a
cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from metaopt.optimizer.by_name import Spread

Leaves = list[Tensor]
SHARED = "shared/"  # leads the name of a slot whose tensor is that of all parameters in a cell


class Cell(NamedTuple):
    """Parameters that have all hyperparameters in common.

    Args:
        places: their indices among all.
        hyper: the values.
    """

    places: list[int]
    hyper: dict[str, Any]

    def take(self, leaves: list[Any]) -> list[Any]:
        """Return what belongs to these parameters."""
        return [leaves[place] for place in self.places]

    def put(self, leaves: list[Any], own: list[Any]) -> list[Any]:
        """Return the list with other entries for these parameters."""
        given = dict(zip(self.places, own, strict=True))
        return [given.get(place, leaf) for place, leaf in enumerate(leaves)]

    def take_memory(self, slots: Mapping[str, Any]) -> dict[str, Any]:
        """Return the memory of these parameters, as their optimizer alone would have it."""
        return {
            name.removeprefix(SHARED): slot[self.places[0]]
            if name.startswith(SHARED)
            else self.take(slot)
            for name, slot in slots.items()
        }

    def put_memory(self, slots: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        """Return the memory with that of these parameters."""
        return {
            name: self.put(slot, [own[name.removeprefix(SHARED)]] * len(self.places))
            if name.startswith(SHARED)
            else self.put(slot, own[name])
            for name, slot in slots.items()
        }


def slot_name(name: str, slot: Any) -> str:
    """Return the name of a slot where there are cells: a tensor for all parameters is one for each
    cell.
    """
    return f"{SHARED}{name}" if isinstance(slot, Tensor) else name


def in_cells(hyper: Mapping[str, Any]) -> list[Cell] | None:
    """Return the cells of all parameters; None if all parameters have the same hyperparameters."""
    if Spread not in map(type, hyper.values()):
        return None
    spreads = {name: value for name, value in hyper.items() if type(value) is Spread}
    cells: dict[tuple[str, ...], list[int]] = {}
    for place, keys in enumerate(zip(*(spread.keys for spread in spreads.values()), strict=True)):
        cells.setdefault(keys, []).append(place)
    return [
        Cell(
            places,
            {
                **hyper,
                **{
                    name: spread.values[key]
                    for (name, spread), key in zip(spreads.items(), keys, strict=True)
                },
            },
        )
        for keys, places in cells.items()
    ]


def slots_in_cells(
    make: Callable[[Leaves], dict[str, Any]], leaves: Leaves, hyper: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the memory before the first step, which `make(leaves)` returns for the parameters of a
    cell.
    """
    cells = in_cells(hyper)
    if cells is None:
        return make(leaves)
    slots: dict[str, list[Any]] = {}
    for cell in cells:
        for name, slot in make(cell.take(leaves)).items():
            named = slot_name(name, slot)
            each = slot if isinstance(slot, list) else [slot] * len(cell.places)
            slots[named] = cell.put(slots.get(named, [None] * len(leaves)), each)
    return slots


def take(hyper: Mapping[str, Any], places: list[int]) -> dict[str, Any]:
    """Return the hyperparameters of some of the parameters."""
    return {
        name: Spread([value.keys[place] for place in places], value.values)
        if type(value) is Spread
        else value
        for name, value in hyper.items()
    }


def change_in_cells(
    change: Callable[[Leaves, Leaves | None, Any], Leaves],
    leaves: Leaves,
    params: Leaves | None,
    hyper: Mapping[str, Any],
) -> Leaves:
    """Return what `change(leaves, params, hyper)` does, called once for each cell."""
    cells = in_cells(hyper)
    if cells is None:
        return change(leaves, params, hyper)
    changed = leaves
    for cell in cells:
        own = change(cell.take(leaves), None if params is None else cell.take(params), cell.hyper)
        changed = cell.put(changed, own)
    return changed


def check_shapes(
    owner: nn.Module, hyper: Mapping[str, Any], leaves: Sequence[Tensor | None]
) -> None:
    """Raise ValueError if a tensor hyperparameter is neither a scalar nor of the shape of every
    parameter that it meets.
    """
    for name, value in hyper.items():
        each = (
            [value.values[key] for key in value.keys]
            if type(value) is Spread
            else [value] * len(leaves)
        )
        for one, leaf in zip(each, leaves, strict=True):
            if (
                leaf is not None
                and isinstance(one, Tensor)
                and one.ndim
                and one.shape != leaf.shape
                and (one.numel() != 1 or one.ndim > leaf.ndim)
            ):
                raise ValueError(
                    f"{type(owner).__name__}: `{name}` must be a scalar, or have the shape of "
                    f"every parameter that it meets, got shape {tuple(one.shape)} for a parameter "
                    f"of shape {tuple(leaf.shape)}. A value for each step is "
                    f"`{name}=PerStep(values)`, one for each of some steps `Piecewise`; one for "
                    f"some parameters is "
                    f'`{name}={{"*.bias": 0.01, "*": 0.1}}`, or `Grouped`; one for each entry of '
                    f"each parameter "
                    f"`{name}=PerParameter(params, 0.1)`."
                )
