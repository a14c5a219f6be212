"""Hyperparameters that differ from parameter to parameter.

Here a value is stored with its pattern of names. `names.choose` finds the names that match,
`values.advance_schedules` evaluates the values of a step, and `parts.find_parts` groups the
parameters that share them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from metaopt.optimizer.module import Configurable, store
from metaopt.optimizer.names import choose
from metaopt.optimizer.schedule import Schedule
from metaopt.optimizer.state import Leaves, refuse_state
from metaopt.optimizer.text import FEW, shorten

Value = float | Tensor
# (schedule, its state, the gradients it sees, if they are known) -> (its value, its next state)
Ask = Callable[[Schedule, Any, Leaves | None], tuple[Value, Any]]


class Spread(NamedTuple):
    """The values of one hyperparameter at a step.

    Args:
        keys: for each parameter, in their order, the key of its value.
        values: key -> value.
    """

    keys: list[str]
    values: dict[str, Value]


class ByName(Configurable):
    """A hyperparameter whose value is that of the first pattern that a parameter's name matches.

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
            store(self, f"value{place}", value)

    @property
    def values(self) -> dict[str, Any]:
        """Pattern -> value."""
        return {
            pattern: getattr(self, f"value{place}") for place, pattern in enumerate(self.patterns)
        }

    @property
    def schedules(self) -> dict[str, Schedule]:
        """Pattern -> its value, where that is a schedule."""
        return {
            pattern: value for pattern, value in self.values.items() if isinstance(value, Schedule)
        }

    def extra_repr(self) -> str:
        """Return the first patterns with their values; schedules print themselves."""
        shown = [f"{pattern!r}: {shorten(value)}" for pattern, value in self.values.items()]
        return ", ".join(shown[:FEW] + [f"and {len(shown) - FEW} more"] * (len(shown) > FEW))

    def init(self, like: Tensor) -> dict[str, Any]:
        """Return pattern -> state of its schedule before the first step."""
        return {pattern: schedule.init(like) for pattern, schedule in self.schedules.items()}

    def match(self, owner: nn.Module, what: str, names: list[str]) -> list[list[str]]:
        """Return for each pattern the names that take its value.

        Args:
            owner: the optimizer, for messages.
            what: the hyperparameter's name, for messages.
            names: those of all parameters.

        Raises:
            ValueError: a name that matches no pattern, or a pattern that gets none.
        """
        return choose(owner, what, self.patterns, names, rest=False)

    def spread(self, owner: nn.Module, what: str, names: list[str]) -> Spread:
        """Return what each parameter takes, schedules as they are; see `match`."""
        found = zip(self.patterns, self.match(owner, what, names), strict=True)
        key_of = {name: pattern for pattern, own in found for name in own}
        return Spread([key_of[name] for name in names], self.values)

    def evaluate(
        self,
        owner: nn.Module,
        what: str,
        state: Any,
        named: dict[str, Tensor | None] | None,
        ask: Ask,
    ) -> tuple[Spread, dict[str, Any]]:
        """Return the values at a step, and what `ask` says are the schedules' next states.

        Args:
            owner: the optimizer, for messages.
            what: the hyperparameter's name, for messages.
            state: pattern -> state of its schedule.
            named: name -> gradient, or None for a parameter without one, in the parameters' order;
                None if they are not known.
            ask: evaluates a schedule.

        Raises:
            ValueError: the state has other schedules.
        """
        schedules = self.schedules
        if schedules.keys() != state.keys():
            refuse_state(
                owner, f", with the schedules {sorted(schedules)} of `{what}`", sorted(state)
            )
        spread = Spread([], self.values) if named is None else self.spread(owner, what, [*named])
        after = {}
        for pattern, schedule in schedules.items():
            seen = None
            if named is not None:
                pairs = zip(spread.keys, named.values(), strict=True)
                seen = [grad for key, grad in pairs if key == pattern and grad is not None]
            spread.values[pattern], after[pattern] = ask(schedule, state[pattern], seen)
        return spread, after
