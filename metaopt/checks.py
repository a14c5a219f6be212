"""What arguments and losses may be, and the errors that say so.

Every check of an argument takes its owner, for the message: an object, whose class is named, a
text, or None where the argument's name says enough.
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from metaopt.transforms import gather_whole, is_differentiable, is_readable


class NonFiniteError(FloatingPointError):
    """A loss, or the gradient that a step needs, became infinite or not a number.

    It is the one exception of our own beside `CheckpointError`, which is a `ValueError`. Everything
    else that is wrong is a `ValueError` or a `TypeError`.

    Args:
        where: whose loss it is, for example `minimize` or a level's name.
        step: index of the first step (or task) with a non-finite value.
        value: that value.
        last_finite: the loss before it, if there was one.
        unit: what `step` counts, "step" or "task".
        what: what the value is.
        remedy: a sentence on what else may mend it.
    """

    def __init__(
        self,
        where: str,
        step: int,
        value: float,
        last_finite: float | None = None,
        *,
        unit: str = "step",
        what: str = "loss",
        remedy: str = "",
    ):
        self.where, self.step, self.value = where, step, value
        self.last_finite, self.unit = last_finite, unit
        before = mend = ""
        if last_finite is not None:
            before = f" The last finite loss was {last_finite:.6g} at {unit} {step - 1}."
        if unit == "step" and step == 0:
            mend = "Check the batch (is it empty?) and the parameters."
        else:
            mend = "Lower the learning rate or clip the gradients."
        said = f"{where}, {unit} {step}: the {what} is {value}.{before} {mend} {remedy}"
        super().__init__(said.rstrip())


class Limits(NamedTuple):
    """The interval low <= value <= high, and value < below."""

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
        if not isinstance(value, Tensor):
            found = [] if self._holds(value) else [value]
        elif not value.is_floating_point():
            raise TypeError(
                f"{_name_argument(owner, name)} must be real and floating-point, got a tensor of "
                f"{value.dtype}. It would be rounded, or lose a part of its derivative. Write "
                "torch.tensor(0.1)."
            )
        else:
            found = self._outside(value) if is_readable(value) else []
        if found:
            end = f"{self.below})" if math.isfinite(self.below) else f"{self.high}]"
            raise ValueError(
                f"{_name_argument(owner, name)} must lie in [{self.low}, {end}, got {found[0]}."
            )

    def _holds(self, value: float) -> bool:
        return self.low <= value <= self.high and value < self.below

    def _outside(self, value: Tensor) -> list[float]:
        """Return the entries out of the limits; nan is."""
        value = value.detach()
        # Written so that nan, for which every comparison is False, is outside.
        inside = (value >= self.low) & (value <= self.high) & (value < self.below)
        return [] if bool(inside.all()) else value[~inside].tolist()


def check_number(owner: object, name: str, value: Any, limits: Limits | None = None) -> float:
    """Return a number as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is out of the limits, by default infinite or nan.
    """
    if not _is_number(value):
        raise TypeError(
            f"{_name_argument(owner, name)} must be a number, got {value!r}. Write {name}=0.1."
        )
    number = float(value)
    (limits or Limits(low=-sys.float_info.max)).check(owner, name, number)
    return number


def check_positive(owner: object, name: str, value: Any, *, or_zero: bool = False) -> float:
    """Return a positive, finite number as a float.

    Raises:
        ValueError: it is anything else; with `or_zero`, 0 is taken too.
    """
    if not _is_number(value) or not (0 < value < math.inf or (or_zero and value == 0)):
        wanted = "a finite number, at least 0" if or_zero else "a positive number"
        raise ValueError(f"{_name_argument(owner, name)} must be {wanted}, got {value!r}.")
    return float(value)


def check_count(
    owner: object, name: str, value: Any, *, least: int = 1, or_none: bool = False
) -> int:
    """Return a number of things.

    Raises:
        ValueError: it is not an integer, or less than `least`. `or_none` is for the message only.
    """
    # True is an integer to Python, and a mistake here.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        wanted += " or None" if or_none else ""
        raise ValueError(f"{_name_argument(owner, name)} must be {wanted}, got {value!r}.")
    return int(value)


def check_flag(owner: object, name: str, value: Any) -> bool:
    """Return a truth value.

    Raises:
        TypeError: it is something else; "no" would be taken for True.
    """
    if not isinstance(value, bool):
        raise TypeError(
            f"{_name_argument(owner, name)} must be True or False, got {value!r}. Write "
            f"{name}=True."
        )
    return value


def check_choice(owner: object, name: str, value: Any, choices: Sequence[str]) -> Any:
    """Return one of some words.

    Raises:
        ValueError: it is another one.
    """
    if value not in choices:
        words = [repr(word) for word in choices]
        wanted = " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
        raise ValueError(f"{_name_argument(owner, name)} must be {wanted}, got {value!r}.")
    return value


def check_scalar(value: Any, where: str = "loss_fn") -> Tensor:
    """Return the value of a loss.

    Raises:
        ValueError: it is not a floating-point scalar; `where` says who returned it.
    """
    if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
        raise ValueError(
            f"`{where}` must return a floating-point scalar, got a {describe(value)}. Take the "
            "mean or the sum."
        )
    return value


def check_differentiable(owner: object, name: str, leaves: Iterable[tuple[str, Any]]) -> None:
    """Raise ValueError unless all are of a kind that has derivatives; their paths stand beside."""
    for path, leaf in leaves:
        if not is_differentiable(leaf):
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise ValueError(
                f"{_name_argument(owner, name)} must be floating-point or complex tensors, got "
                f"{kind} at {path}. Leave it out, or convert it: `torch.as_tensor(w, "
                "dtype=torch.float)`."
            )


def check_finite(losses: Tensor, where: str, *, unit: str = "step") -> None:
    """Raise `NonFiniteError` for the first entry of `losses` [n] that is not finite."""
    if losses.is_meta:  # no values
        return
    # One transfer from the device for all of them.
    values = gather_whole(losses.detach()).tolist()
    first = find_not_finite(values)
    if first is not None:
        last_finite = values[first - 1] if first and unit == "step" else None
        raise NonFiniteError(where, first, values[first], last_finite, unit=unit)


def find_not_finite(values: Sequence[float]) -> int | None:
    """Return the index of the first value that is not finite, if there is one."""
    return next((i for i, value in enumerate(values) if not math.isfinite(value)), None)


def describe(value: Any) -> str:
    """Return what kind of value it is, for a message that says what was got."""
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {tuple(value.shape)}"
    kind = type(value).__name__
    return f"{kind} of {len(value)}" if isinstance(value, tuple) else kind


def _name_argument(owner: object, name: str) -> str:
    if owner is None:
        return f"`{name}`"
    return f"{owner if isinstance(owner, str) else type(owner).__name__}: `{name}`"


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
