"""One evaluation of the objective, and what is read out of it."""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Callable, Generator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaopt.black_box.space import Values
from metaopt.checks import NonFiniteError

Function = Callable[[Values], Any]
Facts = dict[str, Any]  # how a trial ends: its status, loss, metrics and error
Outcome = Facts | TypeError | ValueError  # or the mistake in the program: it returns no number


def evaluate(
    function: Function,
    values: Values,
    objective: str,
    report: Callable[[int, Any], bool] | None = None,
) -> Outcome:
    """Return how a trial with these values ends, or what is wrong with the function's result.

    On an executor this is what its workers run. All that comes back is plain, and an error of the
    function comes back as a value: so an exception of the future is the executor's own.

    Args:
        function: the objective.
        values: of the trial.
        objective: the name of the loss in a dict.
        report: told step and result of each yield of a generator; True stops it. None: a generator
            is a mistake.
    """
    stopped = False
    try:
        result = function(values)
    except Exception as error:  # whatever a user's program raises
        return read_error(error)
    if report is not None and isinstance(result, Generator):
        curve, result = result, None
        for step in itertools.count(1):
            try:
                if stopped:
                    curve.close()
                    break
                result = next(curve)
            except StopIteration:
                break
            except Exception as error:
                return read_error(error)
            if isinstance(mistake := _read(objective, result), Exception):
                return mistake
            stopped = report(step, result)
    return _read(objective, result, stopped=stopped)


def read_error(error: str | BaseException) -> Facts:
    """Return how a trial ends that raised, or of which a text says why it failed."""
    status = "non-finite" if isinstance(error, NonFiniteError) else "failed"
    return {
        "status": status,
        "error": error if isinstance(error, str) else f"{type(error).__name__}: {error}",
    }


def read_result(objective: str, result: Any, *, stopped: bool = False) -> Facts:
    """Return how a trial ends whose evaluation has returned.

    Raises:
        TypeError: something is no number.
        ValueError: the objective is not in the dict.
    """
    if not isinstance(result, Mapping):
        result = {objective: result}
    if objective not in result:
        raise ValueError(f"The result of a trial must have {objective!r}, got {list(result)}.")
    metrics = {name: _as_number(name, value) for name, value in result.items()}
    loss = metrics.pop(objective)
    if math.isfinite(loss):
        return {"status": "stopped early" if stopped else "done", "loss": loss, "metrics": metrics}
    return {"status": "non-finite", "error": f"the {objective} is {loss}", "metrics": metrics}


def _read(objective: str, result: Any, *, stopped: bool = False) -> Outcome:
    """Return what `read_result` does, or the error that it raises."""
    try:
        return read_result(objective, result, stopped=stopped)
    except (TypeError, ValueError) as mistake:
        return mistake


def _as_number(name: Any, value: Any) -> float:
    if not isinstance(name, str):
        raise TypeError(f"The names in the result of a trial must be texts, got {name!r}.")
    if not _is_number(value):
        raise TypeError(
            f"The {name} of a trial must be one number, got {value!r}. Return a float, or a dict "
            "of floats."
        )
    if isinstance(value, Tensor):
        return float(value.detach())
    if isinstance(value, np.ndarray):
        return float(value.reshape(()))
    try:
        return float(value)
    except OverflowError:  # an integer or a fraction beyond float64
        return math.inf if value > 0 else -math.inf


def _is_number(value: Any) -> bool:
    """Return True for a real number, also one in a tensor or array with one entry."""
    if isinstance(value, Tensor):
        is_real = not value.is_complex() and value.dtype != torch.bool
        return is_real and value.numel() == 1 and not value.is_meta
    if isinstance(value, np.ndarray):
        return value.size == 1 and value.dtype.kind in "fiu"
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
