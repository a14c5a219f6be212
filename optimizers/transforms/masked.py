"""Updating some of the parameters only."""

from __future__ import annotations

from collections.abc import Iterable

from metaopt.optimizer import Optimizer, State
from metaopt.optimizer.names import choose

from .by_pattern import ByPattern, Member
from .transform import check_optimizer


class Masked(ByPattern):
    """u = the update of the optimizer for parameters whose names match the mask, else 0.

    `Masked(Adam(1e-3), mask="head.*")`. Names are dict keys, list indices and fields, joined by
    dots; patterns are those of `fnmatch`. The optimizer sees, and has memory for, the matching
    parameters only.

    Args:
        optimizer: what updates the matching parameters.
        mask: a pattern, or several.

    Raises:
        ValueError: (in `init`) a pattern that matches no parameter.
        TypeError: the optimizer is something else, or a pattern is not a string.
    """

    def __init__(self, optimizer: Optimizer, mask: str | tuple[str, ...]):
        super().__init__()
        patterns = (mask,) if isinstance(mask, str) else mask
        is_row = isinstance(patterns, tuple | list) and len(patterns) > 0
        if not is_row or not all(isinstance(pattern, str) for pattern in patterns):
            raise TypeError(
                f"Masked: `mask` must be a pattern or a tuple of them, got {mask!r}. Write "
                f'mask="head.*".'
            )
        self.optimizer = check_optimizer(self, optimizer)
        self.mask = mask if isinstance(mask, str) else tuple(mask)

    def _members(self) -> list[Member]:
        return [Member("optimizer.", self.optimizer)]

    def _choose(self, names: Iterable[str]) -> list[list[str]]:
        patterns = (self.mask,) if isinstance(self.mask, str) else self.mask
        chosen = choose(self, "mask", patterns, names, rest=True)
        matching = {name for own in chosen for name in own}
        return [[name for name in names if name in matching]]

    def _split(self, state: State) -> list[State]:
        return [state]

    def _merge(self, states: list[State]) -> State:
        return states[0]
