"""Where a search looks: named parameters, each with its range."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from metaopt.checks import check_flag, check_number

Value = int | float | str | bool
Values = dict[str, Value]  # of one trial; a parameter that is not active has none
Conditions = Mapping[str, Value | Sequence[Value]]

LARGEST = 2**53  # up to which float64 has every integer
CENTRE = 0.5  # of the unit interval: where models see a parameter that is not active


@dataclass(frozen=True)
class Float:
    """A real number in [low, high].

    Args:
        low: the least value.
        high: the largest.
        log: search the logarithm evenly, for rates and other scales.
        when: the parameter is active only where `Choice` parameters before it have these values,
            for example `when={"optimizer": ("sgd", "nesterov")}`.

    Raises:
        ValueError: the range is empty or infinite, or its logarithm is.
        TypeError: a bound is not a number.
    """

    low: float
    high: float
    log: bool = field(default=False, kw_only=True)
    when: Conditions | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("low", "high"):  # so that Float(0, 1) is Float(0.0, 1.0)
            object.__setattr__(self, name, check_number(self, name, getattr(self, name)))
        _check_range(self, self.low, self.high, self.log)

    def from_unit(self, place: float) -> float:
        """Return the value at a place in [0, 1]."""
        low, high = _scale(self, self.low), _scale(self, self.high)
        value = _unscale(self, low + place * (high - low))
        return min(max(value, self.low), self.high)  # exp(log(high)) may be a little more

    def to_unit(self, value: Value) -> float:
        """Return the place of a value in [0, 1]."""
        low, high = _scale(self, self.low), _scale(self, self.high)
        return (_scale(self, float(value)) - low) / (high - low)

    def holds(self, value: object) -> bool:
        """Return True for a value in the range."""
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and self.low <= value <= self.high  # type: ignore[operator]


@dataclass(frozen=True)
class Int:
    """An integer in low, ..., high.

    Args:
        low: the least value.
        high: the largest.
        log: search the logarithm evenly, for widths and other sizes.
        when: see `Float`.

    Raises:
        ValueError: there is no choice, a bound is beyond 2^53, or has no logarithm.
        TypeError: a bound is not an integer.
    """

    low: int
    high: int
    log: bool = field(default=False, kw_only=True)
    when: Conditions | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("low", "high"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(
                    f"Int: `{name}` must be an integer, got {value!r}. Write Int(1, 10), or "
                    "Float(0.1, 1.0) for real numbers."
                )
            value = operator.index(value)
            if abs(value) > LARGEST:
                raise ValueError(
                    f"Int: `{name}` must lie in -2^53, ..., 2^53, got {value}. Models compute in "
                    "float64, which has no gaps between integers up to there; for larger ones "
                    "search the exponent, Int(0, 30), or Float(1.0, 1e30, log=True)."
                )
            object.__setattr__(self, name, value)
        _check_range(self, self.low, self.high, self.log)

    def from_unit(self, place: float) -> int:
        """Return the value at a place in [0, 1]; each has a piece of the interval around it."""
        low, high = _scale(self, self.low - 0.5), _scale(self, self.high + 0.5)
        value = round(_unscale(self, low + place * (high - low)))
        return min(max(value, self.low), self.high)

    def to_unit(self, value: Value) -> float:
        """Return the middle of a value's piece of [0, 1]."""
        low, high = _scale(self, self.low - 0.5), _scale(self, self.high + 0.5)
        return (_scale(self, float(value)) - low) / (high - low)

    def holds(self, value: object) -> bool:
        """Return True for a value in the range."""
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and self.low <= value <= self.high  # type: ignore[operator]


@dataclass(frozen=True, init=False)
class Choice:
    """One of some values, which have no order: texts, numbers or truth values.

    Args:
        options: the values. For numbers that have an order, `Int` tells a model more.
        when: see `Float`.

    Raises:
        ValueError: there are fewer than two, two that are equal, or an infinite one.
        TypeError: one is of another type.
    """

    options: tuple[Value, ...]
    when: Conditions | None

    def __init__(self, *options: Value, when: Conditions | None = None):
        options = tuple(_as_plain("Choice: an option", option) for option in options)
        if len(options) < 2 or len(set(options)) < len(options):
            raise ValueError(
                f"Choice: there must be at least two options, all different, got {options}. A "
                "value that is not searched stands in the objective."
            )
        object.__setattr__(self, "options", options)
        _set_conditions(self, when)

    def from_unit(self, place: float) -> Value:
        """Return the value at a place in [0, 1]; each has an equal piece."""
        return self.options[min(int(place * len(self.options)), len(self.options) - 1)]

    def to_unit(self, value: Value) -> float:
        """Return the middle of a value's piece of [0, 1]."""
        return (self.options.index(value) + 0.5) / len(self.options)

    def holds(self, value: object) -> bool:
        """Return True for an option; True is not 1."""
        return any(value == one and type(value) is type(one) for one in self.options)


def _as_plain(what: str, value: Any) -> Value:
    """Return a value as one of Python's own kinds, as it will be read from a file."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"{what} must be finite, got {value}. Call it by a text, and look its value up "
                    "in the objective."
                )
            return kind(value)
    if hasattr(value, "__index__"):  # an integer of another library
        return int(value)
    raise TypeError(
        f"{what} must be a text, a number or a truth value, got {value!r}. "
        'Write Choice("relu", "tanh") and look the function up in the objective.'
    )


Parameter = Float | Int | Choice


class Space(dict[str, Parameter]):
    """Name -> parameter, in order; conditions name parameters before them.

    Raises:
        ValueError: there is none, or a condition can never hold.
        TypeError: something is no parameter.
    """

    def __init__(self, parameters: Mapping[str, Parameter]):
        if not isinstance(parameters, Mapping) or not parameters:
            raise ValueError(
                f"The search space must have a parameter, got {parameters!r}. Write "
                '{"rate": mo.Float(1e-4, 1.0, log=True)}.'
            )
        super().__init__()
        for name, parameter in parameters.items():
            if not isinstance(name, str) or not isinstance(parameter, Parameter):
                raise TypeError(
                    f"The search space must be names with Float, Int or Choice, got {name!r}: "
                    f"{parameter!r}."
                )
            for other, wanted in (parameter.when or {}).items():
                self._check_condition(name, other, wanted)
            self[name] = parameter

    def _check_condition(self, name: str, other: str, wanted: object) -> None:
        above = self.get(other)
        if not isinstance(above, Choice):
            raise ValueError(
                f"Parameter {name!r}: `when` must name a Choice that stands before it, got "
                f"{other!r}; there are {[n for n, p in self.items() if isinstance(p, Choice)]}."
            )
        strangers = [value for value in _as_tuple(wanted) if not above.holds(value)]
        if strangers or not _as_tuple(wanted):
            raise ValueError(
                f"Parameter {name!r} is never active: {other!r} is one of {above.options}, got "
                f"{wanted!r}."
            )

    def is_active(self, name: str, values: Mapping[str, Value]) -> bool:
        """Return True if the conditions of a parameter hold, given the values before it."""
        return all(
            other in values and values[other] in _as_tuple(wanted)
            for other, wanted in (self[name].when or {}).items()
        )

    def place(self, units: Mapping[str, float]) -> Values:
        """Return the values at a point of the unit cube, those of active parameters."""
        values: Values = {}
        for name, parameter in self.items():
            if self.is_active(name, values):
                values[name] = parameter.from_unit(units[name])
        return values

    def keep_active(self, values: Mapping[str, Value]) -> Values:
        """Return the values of active parameters only."""
        kept: Values = {}
        for name in self:
            if self.is_active(name, kept):
                kept[name] = values[name]
        return kept

    def fill(self, values: Mapping[str, Value]) -> Values:
        """Return a value for every parameter: where one is not active, its centre."""
        return {
            name: values[name] if name in values else parameter.from_unit(CENTRE)
            for name, parameter in self.items()
        }

    def check(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError unless these are values of just the active parameters."""
        active: list[str] = []
        for name, parameter in self.items():
            if not self.is_active(name, values):
                continue
            active.append(name)
            if name not in values or not parameter.holds(values[name]):
                got = repr(values[name]) if name in values else "nothing"
                raise ValueError(f"Parameter {name!r} must lie in {parameter}, got {got}.")
        if more := sorted(set(values) - set(active)):
            raise ValueError(
                f"The values {more} are of no active parameter; active are {active}. Leave them "
                "out."
            )


def _set_conditions(owner: Parameter, when: Any) -> None:
    """Keep the conditions as they will be compared and written down: plain values, or tuples."""
    if not isinstance(when, Mapping | None):
        raise TypeError(
            f"{type(owner).__name__}: `when` must be a dict, got {when!r}. Write "
            'when={"optimizer": "sgd"}.'
        )
    if when is not None:
        when = {other: _read_wanted(owner, wanted) for other, wanted in when.items()}
    object.__setattr__(owner, "when", when)


def _read_wanted(owner: Parameter, wanted: Any) -> Value | tuple[Value, ...]:
    what = f"{type(owner).__name__}: a value of `when`"
    if isinstance(wanted, list | tuple):
        return tuple(_as_plain(what, value) for value in wanted)
    return _as_plain(what, wanted)


def _check_range(owner: Float | Int, low: float, high: float, log: bool) -> None:
    check_flag(owner, "log", log)
    _set_conditions(owner, owner.when)
    kind = type(owner).__name__
    if not low < high:
        raise ValueError(
            f"{kind}: the range from `low` to `high` is empty, got {low} and {high}. A value that "
            "is not searched stands in the objective."
        )
    if not math.isfinite(high - low):
        raise ValueError(
            f"{kind}: the range from `low` to `high` must have a finite width, got {low} and "
            f"{high}. Search the logarithm of what is so large."
        )
    if log and low <= 0:
        raise ValueError(
            f"{kind}: `low` must be positive where log=True, got {low}. It has no logarithm."
        )


def _scale(parameter: Float | Int, value: float) -> float:
    return math.log(value) if parameter.log else value


def _unscale(parameter: Float | Int, value: float) -> float:
    return math.exp(value) if parameter.log else value


def _as_tuple(wanted: Any) -> tuple[Value, ...]:
    return wanted if isinstance(wanted, tuple) else (wanted,)
