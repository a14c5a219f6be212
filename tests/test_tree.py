"""Arithmetic on trees."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import pytest
import torch
from problems import assert_close
from torch.autograd import forward_ad
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from metaopt import tree

pytestmark = pytest.mark.usefixtures("float64")


def test_the_norm_is_that_of_all_entries() -> None:
    parts = {"a": torch.randn(2, 3), "b": [torch.randn(()), torch.randn(0)]}
    everything = torch.cat([leaf.flatten() for leaf in tree.leaves(parts)])
    assert_close(tree.norm(parts), everything.norm(), 1e-14)


def test_derivatives_at_zero_are_zero_and_elsewhere_true() -> None:
    """Trap 12: sqrt has an infinite slope at 0, and infinity times 0 is nan."""
    zero, four = torch.tensor(0.0), torch.tensor(4.0)
    assert_close(
        [tree.safe_sqrt(x) for x in (zero, four)], [torch.tensor(0.0), torch.tensor(2.0)], 0
    )
    derivative = tree.safe_sqrt
    for expected in (1 / 4, -1 / 32, 3 / 256):  # of sqrt at 4
        derivative = grad(derivative)
        assert derivative(zero) == 0
        assert_close(derivative(four), torch.tensor(expected), 1e-15)
    assert_close(
        vmap(grad(tree.norm))(torch.tensor([[0.0, 0.0], [3.0, 4.0]])),
        torch.tensor([[0.0, 0.0], [0.6, 0.8]]),
        1e-15,
    )


def test_a_root_and_a_norm_of_what_is_no_number_are_none() -> None:
    """They were 0 where a graph was recorded."""
    x = torch.tensor([1.0, torch.nan, -1.0], requires_grad=True)
    assert tree.safe_sqrt(x).isnan().tolist() == [False, True, True]
    assert tree.norm({"x": x}).isnan()
    with torch.no_grad():
        assert tree.norm({"x": x}).isnan()


def test_derivatives_pass_through_a_row_in_which_complex_entries_begin_at_an_odd_place() -> None:
    parts = {"a": torch.randn(1), "z": torch.randn(2, dtype=torch.complex128)}
    weights = torch.arange(5.0)
    found = grad(lambda parts: (tree.ravel(parts) * weights).sum())(parts)
    assert_close(found, {"a": torch.tensor([0.0]), "z": torch.tensor([1 + 2j, 3 + 4j])}, 0)


def test_stack_and_index_are_inverse() -> None:
    trees = [{"a": torch.randn(2), "b": (torch.randn(()),)} for _ in range(3)]
    stacked = tree.stack(trees)
    assert stacked["a"].shape == (3, 2)
    for i, one in enumerate(trees):
        assert_close(tree.index(stacked, i), one, 0)
    assert_close(tree.index(stacked, slice(1, 3))["b"][0], stacked["b"][0][1:], 0)


def test_names_read_like_python() -> None:
    names = [name for name, _ in tree.named_leaves({"net.0.weight": [1, (2,)], "x": 3})]
    assert names == ["['net.0.weight'][0]", "['net.0.weight'][1][0]", "['x']"]
    assert tree.named_leaves(5) == [("the tensor itself", 5)]


def test_a_sum_over_leaves() -> None:
    assert tree.sum_leaves(lambda leaf: 2 * leaf, [torch.tensor(1.0), (torch.tensor(2.0),)]) == 6


def test_flatten_like_takes_only_the_same_structure() -> None:
    structure = tree.flatten({"a": 1, "b": 2})[1]
    assert tree.flatten_like(structure, {"a": 3, "b": 4}, "x") == [3, 4]
    with pytest.raises(
        ValueError,
        match=r"`x` does not have the expected structure: missing \[\"\['b'\]\"\], unknown "
        r"\[\"\['c'\]\"\]",
    ):
        tree.flatten_like(structure, {"a": 3, "c": 4}, "x")


def test_a_complex_number_is_two_real_ones_in_a_row() -> None:
    values = {"a": torch.tensor([1 + 2j, 3 - 4j]), "b": torch.tensor(5.0)}
    row = tree.ravel(values)
    assert row.tolist() == [1, 2, 3, -4, 5]
    torch.testing.assert_close(tree.unravel(row, values), values, rtol=0, atol=0)


def test_leading_axes_are_told_by_path() -> None:
    one, two = torch.ones(2, 3), torch.ones(0)
    assert tree.leading_axes({"a": one, "b": [two]}) == {"['a']": 2, "['b'][0]": 0}
    assert tree.leading_axes({"a": torch.tensor(1.0), "b": 2}) == {"['a']": -1, "['b']": -1}
    assert tree.leading_axes({}) == {}


class Pair(NamedTuple):
    one: Any
    other: Any


def test_trees_are_mapped_and_read_as_torch_does() -> None:
    """Also nodes that only torch knows, and structures that differ.

    And empty ones, and dicts in another order.
    """
    nested = {
        "b": [1, (2.0, None)],
        "a": Pair(torch.ones(2), {}),
        "c": OrderedDict(z=3, y=[]),
        "d": torch.Size([4]),
    }
    assert str(tree.leaves(nested)) == str(pytree.tree_leaves(nested))
    assert str(tree.map(lambda leaf: (leaf, "seen"), nested)) == str(
        pytree.tree_map(lambda leaf: (leaf, "seen"), nested)
    )
    pairs = [
        ({"a": 1, "b": 2}, {"b": 20, "a": 10}),
        ([1, (2,)], [{"x": 0}, ([3],)]),
        (Pair(1, [2]), Pair(3, [4])),
        (1, [2, 3]),
    ]
    for first, second in pairs:
        expected = pytree.tree_map(lambda a, b: (a, b), first, second)
        assert tree.map(lambda a, b: (a, b), first, second) == expected
        assert type(tree.map(lambda a, b: (a, b), first, second)) is type(expected)
    for first, second in (({"a": 1}, {"b": 1}), ([1, 2], [1]), ((1,), [1]), ([1], 1)):
        with pytest.raises(ValueError, match=r"[Nn]ode|arity|key"):
            tree.map(lambda a, b: (a, b), first, second)

    def sum_and_difference(a: Any, b: Any) -> Any:
        return a + b, a - b

    assert tree.map(sum_and_difference, Pair(3, [2]), Pair(1, [1])) == Pair((4, 2), [(3, 1)])
    assert tree.map(
        lambda leaf: "leaf", [(1, 2)], is_leaf=lambda node: isinstance(node, tuple)
    ) == ["leaf"]


def test_nothing_is_last_under_forward_mode() -> None:
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(torch.tensor([0.0, 4.0]), torch.ones(2))
        assert_close(
            forward_ad.unpack_dual(tree.safe_sqrt(x)).tangent, torch.tensor([0.0, 0.25]), 1e-15
        )


def test_norms_of_half_precision_are_not_rounded_leaf_by_leaf() -> None:
    parts = [torch.full((1000,), 1.01, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.float32)]
    with torch.no_grad():
        found = tree.norm(parts)
    assert_close(found, tree.norm(parts), 1e-7)
