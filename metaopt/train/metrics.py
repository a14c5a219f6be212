"""The numbers that a training and its validation give, by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

Metrics = dict[str, float]


def read_metrics(training: Any, given: Any) -> Metrics:
    """Return as numbers what a training's `step` returned."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"`step` of {type(training).__name__} must return its metrics, a dict of numbers by "
            f"name, got {given!r}. Return {{}} if there are none."
        )
    return read_numbers(given)


def read_numbers(metrics: Mapping[str, float | Tensor]) -> Metrics:
    """Return metrics as numbers of Python."""
    return {name: as_number(f"The metric {name!r}", value) for name, value in metrics.items()}


def read_validation(given: Any) -> Metrics:
    """Return what `validate` returned, by name."""
    if not isinstance(given, Mapping):
        return {"validation": as_number("What `validate` returns", given)}
    if "loss" not in given:
        raise TypeError(
            f"What `validate` returns must have 'loss', which decides what is best, got "
            f"{sorted(given)}."
        )
    return {
        f"validation/{name}": as_number(f"The validation {name!r}", value)
        for name, value in given.items()
    }


def read_values(training: Any) -> Metrics:
    """Return the hyperparameters that are single numbers, of a training that tells them."""
    tell = getattr(training, "values", None)
    found: Mapping[str, Any] = tell() if callable(tell) else {}
    return {
        name: float(value)
        for name, value in found.items()
        if not isinstance(value, Tensor) or value.numel() == 1
    }


def as_number(what: str, value: Any) -> float:
    """Return a number, of Python or of another library.

    Raises:
        TypeError: it is none, or several.
    """
    try:
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = (
            f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        )
        raise TypeError(f"{what} must be one number, got {kind}. Take its mean.") from error
