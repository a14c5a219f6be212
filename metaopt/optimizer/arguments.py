"""What the arguments of a constructor may be: numbers and tensors within limits, counts, flags and
words.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from metaopt.transforms import values_are_readable


class Limits(NamedTuple):
    """low <= value <= high, and value < below."""

    low: float = 0.0
    high: float = math.inf
    below: float = math.inf

    def check(self, owner: object, name: str, value: float | Tensor) -> None:
        """Raise unless it is a number, or a real floating-point tensor, within the limits.

        The entries of a tensor are looked at where they can be: not under a transform or a
        compiler, nor on the device "meta".

        Raises:
            TypeError: a tensor of integers, truth values or complex numbers.
            ValueError: out of the limits, or not a number.
        """
        kind = type(owner).__name__
        if not isinstance(value, Tensor):
            found = [] if self._holds(value) else [value]
        elif not value.is_floating_point():
            raise TypeError(
                f"{kind}: `{name}` must be real and floating-point, got a tensor of {value.dtype}. "
                f"It would be rounded, or lose a "
                "part of its derivative. Write torch.tensor(0.1)."
            )
        else:
            found = self._outside(value) if is_readable(value) else []
        if found:
            limit = (
                f"[{self.low}, {self.below})"
                if math.isfinite(self.below)
                else f"[{self.low}, {self.high}]"
            )
            raise ValueError(f"{kind}: `{name}` must lie in {limit}, got {found[0]}.")

    def _holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value < self.below

    def _outside(self, value: Tensor) -> list[float]:
        """Return the entries out of the limits; nan is."""
        value = value.detach()
        inside = (value >= self.low) & (value <= self.high) & (value < self.below)
        return [] if bool(inside.all()) else value[~inside].tolist()


def is_readable(tensor: Tensor) -> bool:
    """Return True if the entries can be looked at; those of other classes may be fake, or spread
    over processes.
    """
    return values_are_readable() and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)


def note_limits(owner: nn.Module, name: str, limits: Limits) -> None:
    """Remember the limits of the attribute `name`, for `check_limits`."""
    owner.__dict__.setdefault("_limits", {})[name] = limits


def check_limits(module: nn.Module) -> None:
    """Raise ValueError if a number or tensor in a module is out of the limits it was given with."""
    for owner in module.modules():
        for name, limits in owner.__dict__.get("_limits", {}).items():
            if isinstance(value := getattr(owner, name), float | Tensor):
                limits.check(owner, name, value)


def check_number(owner: object, name: str, value: Any, limits: Limits | None = None) -> float:
    """Return a number that is never learned, as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is out of the limits, by default infinite or nan.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(
            f"{type(owner).__name__}: `{name}` must be a number, got {value!r}. Write {name}=0.1."
        )
    (limits or Limits(low=-sys.float_info.max)).check(owner, name, value)
    return float(value)


def check_positive(owner: object, name: str, value: Any) -> float:
    """Return a positive number that is never learned.

    Raises:
        TypeError: it is no number.
        ValueError: it is not positive and finite.
    """
    number = check_number(owner, name, value)
    if number <= 0:
        raise ValueError(f"{type(owner).__name__}: `{name}` must be positive, got {value}.")
    return number


def check_count(owner: object, name: str, value: Any, *, least: int = 1) -> int:
    """Return a number of something.

    Raises:
        ValueError: it is no integer, or less than `least`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {wanted}, got {value!r}.")
    return value


def check_flag(owner: object, name: str, value: Any) -> bool:
    """Return a truth value.

    Raises:
        TypeError: it is something else; "no" would be taken for True.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"{type(owner).__name__}: `{name}` must be True or False, got {value!r}. Write "
            f"{name}=True."
        )
    return value


def check_choice(owner: object, name: str, value: Any, choices: Sequence[str]) -> Any:
    """Return one of some words.

    Raises:
        ValueError: it is none of them.
    """
    if value not in choices:
        words = (
            " or ".join(map(repr, choices))
            if len(choices) == 2
            else f"one of {', '.join(map(repr, choices))}"
        )
        raise ValueError(f"{type(owner).__name__}: `{name}` must be {words}, got {value!r}.")
    return value
