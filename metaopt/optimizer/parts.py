"""Parts: parameters that make their step in one call of `update`.

All parameters are one part, as a rule. There are several where hyperparameters differ by name, and
where each parameter counts its own steps. Memory over all parameters is then one over those of a
part, and the state holds it once for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaopt.optimizer.by_name import Spread
from metaopt.optimizer.state import Hyper, Leaves


class Part(NamedTuple):
    """Parameters that share their hyperparameters and their history.

    Args:
        places: their indices among all.
        hyper: the values of their hyperparameters.
    """

    places: list[int]
    hyper: Hyper

    def take(self, leaves: Sequence[Any]) -> list[Any]:
        """Return what belongs to these parameters."""
        return [leaves[place] for place in self.places]

    def put(self, leaves: list[Any], own: Iterable[Any]) -> None:
        """Write what belongs to these parameters into the list."""
        for place, leaf in zip(self.places, own, strict=True):
            leaves[place] = leaf

    def repeat(self, shared: Any) -> list[Any]:
        """Return what they share, once for each."""
        return [shared] * len(self.places)


def is_divided(hyper: Hyper) -> bool:
    """Return True if a hyperparameter differs by name."""
    return Spread in map(type, hyper.values())


def find_parts(
    hyper: Hyper, places: Iterable[int], history: Sequence[Sequence[Tensor]] = ()
) -> list[Part]:
    """Return the parts of the parameters in some places.

    Args:
        hyper: the hyperparameters' values, of which a `Spread` differs by name.
        places: indices of parameters.
        history: rows with a tensor for each parameter, among them its step count. The values may
            be batched or traced, so they are not read. Parameters that made every step together
            have the very same tensors, however: `separate_state` begins with one, and what a part
            is given next is one again.
    """
    spreads = {name: value for name, value in hyper.items() if type(value) is Spread}
    found: dict[Any, list[int]] = {}
    for place in places:
        keys = tuple(spread.keys[place] for spread in spreads.values())
        past: Any = tuple(id(row[place]) for row in history)
        # a compiler does not see which tensor is which, and joins the operations itself
        if history and torch.compiler.is_compiling():
            past = place
        found.setdefault((keys, past), []).append(place)
    parts = []
    for (keys, _), own in found.items():
        pairs = zip(spreads.items(), keys, strict=True)
        parts.append(Part(own, {**hyper, **{name: one.values[key] for (name, one), key in pairs}}))
    return parts


def change_in_parts(
    change: Callable[[Leaves, Leaves | None, Hyper], Leaves],
    leaves: list[Any],
    params: list[Any] | None,
    parts: Sequence[Part],
) -> list[Any]:
    """Return the leaves as `change(leaves, params, hyper)` makes them, called once for a part."""
    changed = [*leaves]
    for part in parts:
        own = None if params is None else part.take(params)
        part.put(changed, change(part.take(leaves), own, part.hyper))
    return changed
