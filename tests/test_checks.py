"""Checks of arguments and losses: what they take, what they return and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from metaopt.checks import (
    Limits,
    NonFiniteError,
    check_choice,
    check_count,
    check_differentiable,
    check_finite,
    check_flag,
    check_number,
    check_positive,
    check_scalar,
)
from optimizers import SGD

TAKEN: list[tuple[Callable[..., Any], Any, dict[str, Any]]] = [
    (check_number, -2, {}),
    (check_number, np.float32(0.5), {}),
    (check_positive, Fraction(1, 2), {}),
    (check_positive, 0, {"or_zero": True}),
    (check_count, 3, {}),
    (check_count, np.int64(3), {}),
    (check_count, 0, {"least": 0}),
    (check_flag, False, {}),
    (check_choice, "a", {"choices": ("a", "b")}),
]


@pytest.mark.parametrize(("check", "value", "options"), TAKEN)
def test_what_is_right_is_returned(
    check: Callable[..., Any], value: Any, options: dict[str, Any]
) -> None:
    found = check(None, "x", value, **options)
    assert found == value
    assert type(found) in (float, int, bool, str)


REFUSED: list[tuple[Callable[..., Any], Any, dict[str, Any], type[Exception], str]] = [
    (check_number, True, {}, TypeError, r"`x` must be a number, got True. Write x=0.1"),
    (check_number, math.nan, {}, ValueError, r"`x` must lie in \[.*\], got nan"),
    (check_number, 1, {"limits": Limits(below=1.0)}, ValueError, r"must lie in \[0.0, 1.0\), got"),
    (check_positive, 0, {}, ValueError, "`x` must be a positive number, got 0"),
    (check_positive, math.inf, {}, ValueError, "`x` must be a positive number, got inf"),
    (check_positive, "1", {}, ValueError, "`x` must be a positive number, got '1'"),
    (check_positive, -1, {"or_zero": True}, ValueError, "a finite number, at least 0, got -1"),
    (check_count, 1.0, {}, ValueError, "`x` must be a positive integer, got 1.0"),
    (check_count, True, {"or_none": True}, ValueError, "a positive integer or None, got True"),
    (check_count, 1, {"least": 2}, ValueError, "`x` must be an integer of at least 2, got 1"),
    (check_flag, "no", {}, TypeError, "`x` must be True or False, got 'no'. Write x=True"),
    (check_choice, "c", {"choices": ("a", "b")}, ValueError, "`x` must be 'a' or 'b', got 'c'"),
    (check_choice, 1, {"choices": ("a", "b", "c")}, ValueError, "one of 'a', 'b', 'c', got 1"),
]


@pytest.mark.parametrize(("check", "value", "options", "error", "message"), REFUSED)
def test_what_is_wrong_is_said(
    check: Callable[..., Any],
    value: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        check(None, "x", value, **options)


@pytest.mark.parametrize(
    ("owner", "said"), [(SGD(0.1), "^SGD: `x`"), ("level 'a'", "^level 'a': `x`"), (None, "^`x`")]
)
def test_the_owner_of_an_argument_is_named(owner: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_count(owner, "x", 0)


def test_a_tensor_is_looked_at_where_it_can_be() -> None:
    Limits().check(None, "x", torch.tensor([-1.0], device="meta"))
    Limits().check(None, "x", torch.ones(2))
    with pytest.raises(ValueError, match=r"`x` must lie in \[0.0, inf\], got -1.0"):
        Limits().check(None, "x", torch.tensor([2.0, -1.0]))
    with pytest.raises(TypeError, match="`x` must be real and floating-point, got a tensor of"):
        Limits().check(None, "x", torch.tensor(1))


def test_a_loss_is_a_scalar() -> None:
    loss = torch.tensor(1.0)
    assert check_scalar(loss) is loss
    for wrong, kind in (
        (1.0, "float"),
        ((loss, 1), "tuple of 2"),
        (torch.tensor(1), "torch.int64"),
    ):
        with pytest.raises(
            ValueError, match=f"`f` must return a floating-point scalar, got a {kind}"
        ):
            check_scalar(wrong, "f")


def test_the_first_loss_that_is_not_finite_is_named() -> None:
    check_finite(torch.ones(3), "here")
    check_finite(torch.full((2,), torch.nan, device="meta"), "here")
    with pytest.raises(
        NonFiniteError, match=r"here, step 2: the loss is inf. The last .* 1 at step 1"
    ):
        check_finite(torch.tensor([2.0, 1.0, torch.inf]), "here")
    with pytest.raises(NonFiniteError, match=r"step 0: the loss is nan. Check the batch"):
        check_finite(torch.tensor([torch.nan]), "here")
    with pytest.raises(NonFiniteError, match=r"task 1: the loss is nan. Lower the learning rate"):
        check_finite(torch.tensor([1.0, torch.nan]), "here", unit="task")


def test_what_has_no_derivative_is_named_by_its_path() -> None:
    check_differentiable(None, "x", [("a", torch.ones(1)), ("b", torch.ones(1).cfloat())])
    for wrong, kind in ((torch.tensor(1), "torch.int64"), (1.0, "float")):
        with pytest.raises(ValueError, match=f"`x` must be floating-point or .*, got {kind} at b"):
            check_differentiable(None, "x", [("a", torch.ones(1)), ("b", wrong)])
