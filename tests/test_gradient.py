"""Gradients of scalars of trees, and cotangents of chosen parts of trees."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems import assert_close
from torch import Tensor

from metaopt.autodiff.gradient import constant_gradient, gradient
from metaopt.autodiff.pullback import Linearized, choose, pull_back, put, spread
from metaopt.exact_ops import any_order

torch.manual_seed(0)
W = {
    "a": torch.randn(3, dtype=torch.float64),
    "b": [torch.randn(2, 2, dtype=torch.float64), torch.randn((), dtype=torch.float64)],
}


def bowl(w: Any) -> tuple[Tensor, dict[str, Tensor]]:
    matrix, shift = w["b"]
    return (matrix @ matrix).sin().sum() * shift + (w["a"] ** 3).sum(), {"shift": shift}


def leaves(w: Any) -> list[Tensor]:
    return [w["a"], *w["b"]]


class TestGradient:
    @pytest.mark.parametrize("is_under_a_mode", [False, True])
    @pytest.mark.parametrize("again", [False, True])
    def test_it_is_that_of_torch(self, again: bool, is_under_a_mode: bool) -> None:
        """From the engine, or, under a mode for torch's functions, from `torch.autograd.grad`."""
        at = {
            "a": W["a"].clone().requires_grad_(),
            "b": [leaf.clone().requires_grad_() for leaf in W["b"]],
        }
        expected = torch.autograd.grad(bowl(at)[0], leaves(at), create_graph=True)
        with torch.set_grad_enabled(again):
            if is_under_a_mode:
                with any_order():
                    grads, value, aux = gradient(bowl, at)
            else:
                grads, value, aux = gradient(bowl, at)
        assert_close(leaves(grads), [*expected], 1e-14)
        assert_close(value, bowl(at)[0], 0.0)
        assert [value.requires_grad, aux["shift"].requires_grad, grads["a"].requires_grad] == [
            again
        ] * 3
        if again:
            second, wanted = (
                torch.autograd.grad(sum(g.sum() for g in one), leaves(at))
                for one in (leaves(grads), expected)
            )
            assert_close([*second], [*wanted], 1e-13)

    def test_what_f_does_not_depend_on_gets_zeros_or_none(self) -> None:
        with torch.no_grad():
            for function in (lambda w: ((w["a"] ** 2).sum(), ()), lambda w: (torch.ones(()), ())):
                grads = leaves(gradient(function, W)[0])
                assert_close(grads[1:], [torch.zeros_like(leaf) for leaf in W["b"]], 0.0)
                assert leaves(gradient(function, W, allow_unused=True)[0])[1:] == [None, None]

    def test_a_failing_function_leaves_gradients_as_they_were(self) -> None:
        for again in (False, True):
            with torch.set_grad_enabled(again):
                with pytest.raises(ZeroDivisionError):
                    gradient(
                        lambda w: (w["a"].sum() / (1 // 0), ()),
                        {"a": torch.ones(2, requires_grad=True)},
                    )
                assert torch.is_grad_enabled() == again

    def test_no_graph_begins_where_nobody_asked_for_one(self) -> None:
        """Of what is not differentiated, with gradients enabled.

        Constants, unless f reads what is.
        """
        w = {"a": torch.ones(2), "b": torch.ones(2, requires_grad=True)}
        meta = torch.tensor(2.0, requires_grad=True)

        def through(*names: str, scale: Any = 1.0, other: Any = 0.0) -> list[bool]:
            """Return of which results a graph goes on.

            They are the grads of a and b, the value, an aux that reads a, and one that reads meta.
            """
            at = {name: w[name] for name in names}
            grads, value, aux = gradient(
                lambda at: (
                    sum((p**2).sum() for p in at.values()) * scale + other,
                    (at["a"] * 2, meta * 3),
                ),
                at,
            )
            return [result.requires_grad for result in (*grads.values(), value, *aux)]

        assert through("a") == [False, False, False, True]
        assert through("a", scale=meta) == [True, True, False, True]
        assert through("a", other=meta) == [False, True, False, True]
        assert through("a", "b") == [False, True, True, False, True]

    def test_a_gradient_inside_another_knows_its_variables(self) -> None:
        """Both at what autograd does not track, the inner one reading the outer one's variable.

        d/dv of dL/dw at w = 1 is 2 v.
        """
        w, v = torch.tensor(1.0), torch.tensor(3.0)

        def inner(v: Tensor) -> tuple[Tensor, Any]:
            return gradient(lambda w: (w * v**2, ()), w)[0], ()

        for again in (False, True):
            with torch.set_grad_enabled(again):
                found = gradient(inner, v)[0]
            assert_close(found, torch.tensor(6.0), 0.0)
            assert not found.requires_grad
        scale = torch.tensor(5.0, requires_grad=True)
        found = gradient(lambda v: (scale * inner(v)[0], ()), v)[0]
        assert_close(torch.autograd.grad(found, scale)[0], torch.tensor(6.0), 0.0)

    def test_in_forward_mode_the_tangent_is_kept(self) -> None:
        with torch.autograd.forward_ad.dual_level():
            w = torch.autograd.forward_ad.make_dual(torch.tensor(2.0), torch.tensor(1.0))
            for again in (False, True):
                with torch.set_grad_enabled(again):
                    slope = gradient(lambda w: (w**3, ()), w)[0]
                assert_close(
                    torch.autograd.forward_ad.unpack_dual(slope).tangent, torch.tensor(12.0), 1e-6
                )

    def test_the_gradient_is_constant_and_the_value_is_not(self) -> None:
        w, meta = torch.tensor(2.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
        for at in (w, w.detach()):
            grad, value, aux = constant_gradient(lambda w: (meta * w**2, w * meta), at)
            assert_close(grad, torch.tensor(12.0), 0.0)
            assert not grad.requires_grad
            assert_close(torch.autograd.grad(value + aux, meta)[0], torch.tensor(6.0), 0.0)
        with torch.no_grad():
            assert not any(
                leaf.requires_grad
                for leaf in constant_gradient(lambda w: (meta * w**2, w * meta), w)
            )
        assert not constant_gradient(lambda w: (w**2, w), w.detach())[1].requires_grad
        assert_close(
            constant_gradient(lambda w: (w["a"] ** 2, ()), {"a": w, "b": w})[0]["b"],
            torch.tensor(0.0),
            0.0,
        )

    def test_a_complex_value_is_refused(self) -> None:
        with torch.no_grad(), pytest.raises(RuntimeError, match="real scalar"):
            gradient(lambda w: (w["a"].sum() * 1j, ()), W)


class TestParts:
    """One bool may stand for all leaves of a part."""

    @pytest.mark.parametrize(
        ("short", "full"),
        [
            ({"a": False, "b": True}, {"a": False, "b": [True, True]}),
            ({"a": True, "b": [False, True]}, {"a": True, "b": [False, True]}),
            (True, {"a": True, "b": [True, True]}),
        ],
    )
    def test_a_bool_is_as_many(self, short: Any, full: Any) -> None:
        assert [*map(id, choose(W, short))] == [*map(id, choose(W, full))]
        fresh = [leaf + 1 for leaf in choose(W, full)]
        assert_close(leaves(put(fresh, W, short)), leaves(put(fresh, W, full)), 0.0)
        short_bars, full_bars = (
            pull_back(lambda w: bowl(w)[0], (W,), torch.tensor(2.0).double(), (one,))[0]
            for one in (short, full)
        )
        expected = gradient(bowl, W)[0]
        for bars in (short_bars, full_bars):
            found = [
                (bar, 2 * grad)
                for bar, grad in zip(leaves(bars), leaves(expected), strict=True)
                if bar is not None
            ]
            assert len(found) == len(fresh)
            for bar, grad in found:
                assert_close(bar, grad, 1e-14)

    def test_what_is_not_wanted_is_none(self) -> None:
        assert spread([], W, False) is None
        assert spread([], W, {"a": False, "b": False}) == {"a": None, "b": None}
        assert spread([1, 2], W, {"a": False, "b": True}) == {"a": None, "b": [1, 2]}
        nothing = pull_back(lambda w: bowl(w)[0], (W,), None, ({"a": False, "b": True},))
        assert nothing == ({"a": None, "b": [None, None]},)


def test_a_linearized_function_is_pulled_back_as_often_as_one_likes() -> None:
    calls = []

    def function(one: Any, other: Any) -> list[Tensor]:
        calls.append(one)
        return [one["a"] * other[0], other[1] ** 2, torch.ones(())]

    arguments = ({"a": torch.tensor(2.0)}, [torch.tensor(3.0), torch.tensor(4.0), torch.tensor(7)])
    with torch.no_grad():
        point = Linearized(function, arguments, (True, [True, True, False]))
        for c in (1.0, 2.0):
            seeds = [torch.tensor(c), torch.tensor(1.0), torch.tensor(1.0)]
            assert point.pull_back(seeds, 0) == {"a": 3 * c}
            assert point.pull_back(seeds, 1) == [2 * c, 8.0, None]
        rows = torch.func.vmap(lambda c: point.pull_back([c, c, c], 0)["a"])(
            torch.tensor([1.0, 5.0])
        )
    assert_close(rows, torch.tensor([3.0, 15.0]), 0.0)
    assert len(calls) == 1
