"""Hyperparameters that differ from parameter to parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from metaopt.optimizer.module import Configurable
from metaopt.optimizer.names import choose
from metaopt.optimizer.schedule import Schedule, advance, read
from metaopt.optimizer.text import FEW, shorten

Value = float | Tensor


class Spread(NamedTuple):
    """The values of one hyperparameter at a step.

    Args:
        keys: for each parameter, in their order, the key of its value.
        values: key -> value.
    """

    keys: list[str]
    values: dict[str, Value]


class ByName(Configurable):
    """A hyperparameter whose value is that of the first pattern which the name of a parameter
    matches.

    `SGD(lr={"*.bias": 0.01, "*": Cosine(0.1, 100)})` makes one. Names are dict keys, list indices
    and fields, joined by dots; patterns are those of `fnmatch`. Each value may be a number, a
    tensor, a parameter or a schedule, which observes the gradients of its own parameters.

    Args:
        values: pattern -> value, in this order.

    Raises:
        ValueError: there are none.
        TypeError: a pattern that is not a string.
    """

    def __init__(self, values: Mapping[str, Any]):
        super().__init__()
        if not values:
            raise ValueError(
                'A hyperparameter by names must not be empty, got {}. Write {"*": 0.1}.'
            )
        for pattern in values:
            if not isinstance(pattern, str):
                raise TypeError(
                    f"A hyperparameter by names needs patterns, got {pattern!r}. Write {{'*.bias': "
                    f"0.01, '*': 0.1}}."
                )
        self.patterns = tuple(values)
        for place, value in enumerate(values.values()):
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(f"value{place}", value)
            else:
                setattr(self, f"value{place}", float(value) if type(value) is int else value)

    @property
    def values(self) -> dict[str, Any]:
        """Pattern -> value."""
        return {
            pattern: getattr(self, f"value{place}") for place, pattern in enumerate(self.patterns)
        }

    def extra_repr(self) -> str:
        """Return the first patterns with their values; schedules print themselves."""
        shown = [f"{pattern!r}: {shorten(value)}" for pattern, value in self.values.items()]
        return ", ".join(shown[:FEW] + [f"and {len(shown) - FEW} more"] * (len(shown) > FEW))

    def init(self, like: Tensor) -> dict[str, Any]:
        """Return pattern -> state of its schedule before the first step."""
        return {
            pattern: value.init(like)
            for pattern, value in self.values.items()
            if isinstance(value, Schedule)
        }

    def match(self, owner: nn.Module, what: str, names: list[str]) -> list[list[str]]:
        """Return for each pattern the names that take its value; `owner` and `what`, its
        hyperparameter, are for messages.

        Raises:
            ValueError: a name that matches no pattern, or a pattern that gets none.
        """
        return choose(owner, what, self.patterns, names, rest=False)

    def spread(self, owner: nn.Module, what: str, names: list[str]) -> Spread:
        """Return what each parameter takes, schedules as they are; see `match`."""
        found = zip(self.patterns, self.match(owner, what, names), strict=True)
        key_of = {name: pattern for pattern, own in found for name in own}
        return Spread([key_of[name] for name in names], self.values)

    def advance(
        self,
        owner: nn.Module,
        what: str,
        state: Any,
        *,
        named: dict[str, Tensor | None],
        step: Tensor,
        loss: Tensor | None,
    ) -> tuple[Spread, dict[str, Any]]:
        """Return (the values at this step, the next states of the schedules).

        Args:
            owner: the optimizer.
            what: the hyperparameter's name.
            state: pattern -> state.
            named: name -> gradient or None, in the order of the parameters.
            step: index of the step, from 0.
            loss: the loss, if the caller of the optimizer gave it.
        """
        keys, values = self.spread(owner, what, [*named])
        after = {}
        for pattern, schedule in self._schedules(owner, what, state).items():
            pairs = zip(keys, named.values(), strict=True)
            grads = [grad for key, grad in pairs if key == pattern and grad is not None]
            if not grads:  # nobody takes its value at this step, and it has nothing to see
                values[pattern], after[pattern] = 0.0, state[pattern]
                continue
            values[pattern], after[pattern] = advance(
                schedule, state[pattern], step=step, loss=loss, grads=grads
            )
        return Spread(keys, values), after

    def values_at(
        self,
        owner: nn.Module,
        what: str,
        state: Any,
        *,
        named: dict[str, Tensor] | None,
        like: Tensor,
        **seen: Any,
    ) -> dict[str, Value]:
        """Return pattern -> value at this step; see `Schedule.value_at`."""
        keys, values = ([], self.values) if named is None else self.spread(owner, what, [*named])
        for pattern, schedule in self._schedules(owner, what, state).items():
            grads = None
            if named is not None:
                grads = [
                    grad for key, grad in zip(keys, named.values(), strict=True) if key == pattern
                ]
            values[pattern] = read(schedule, state[pattern], grads=grads, like=like, **seen)
        return values

    def _schedules(self, owner: nn.Module, what: str, state: Any) -> dict[str, Schedule]:
        """Return pattern -> schedule; raise ValueError if the state has others."""
        schedules = {
            pattern: value for pattern, value in self.values.items() if isinstance(value, Schedule)
        }
        if schedules.keys() != state.keys():
            raise ValueError(
                f"`state` must be that of this {type(owner).__name__}, with the schedules "
                f"{sorted(schedules)} of `{what}`, got {sorted(state)}. Pass what its own `init`, "
                f"or the step before, returned."
            )
        return schedules
