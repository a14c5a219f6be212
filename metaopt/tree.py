"""Arithmetic on trees of tensors.

A tree is a nesting of dicts, lists, tuples and named tuples with tensors at the leaves.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from metaopt.torch_internals import foreach_add, foreach_norm, pytree
from metaopt.transforms import gather_whole, is_tracked, is_unrecorded

Tree = Any
Structure = pytree.TreeSpec

flatten = pytree.tree_flatten


_HALF = {torch.float16, torch.bfloat16}  # whose norms would be rounded one by one
_LEAVES = {Tensor, Parameter, bool, int, float, str, type(None)}
# Of the types of some values; a loop in Python took three times as long.
_all_leaves = _LEAVES.issuperset


def map(
    fn: Callable[..., Any], tree: Tree, *rest: Tree, is_leaf: Callable[[Tree], bool] | None = None
) -> Tree:
    """Return the tree of fn(leaf, *leaves at the same place in the `rest`).

    The `rest` begin with the structure of the first. As torch's `tree_map`, which makes a
    description of the structure first: on dicts, lists and tuples this takes a quarter of the time.
    """
    if torch.compiler.is_compiling() or is_leaf is not None:
        return pytree.tree_map(fn, tree, *rest, is_leaf=is_leaf)
    return _map(fn, tree, *rest)


def _map(fn: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    kind = type(tree)
    if kind in _LEAVES:
        return fn(tree, *rest)
    # The leaves in it by themselves: to call this function for each is half of the time.
    if kind is dict:
        if not rest:
            if _all_leaves(builtins.map(type, tree.values())):
                return {key: fn(value) for key, value in tree.items()}
            return {key: _map(fn, value) for key, value in tree.items()}
        if all(type(other) is dict and other.keys() == tree.keys() for other in rest):
            if len(rest) == 1:
                (other,) = rest
                return {
                    key: fn(value, other[key])
                    if type(value) in _LEAVES
                    else _map(fn, value, other[key])
                    for key, value in tree.items()
                }
            return {
                key: _map(fn, value, *[other[key] for other in rest]) for key, value in tree.items()
            }
    elif not rest and (kind is list or kind is tuple):
        return kind([fn(value) if type(value) in _LEAVES else _map(fn, value) for value in tree])
    elif _is_row(kind) and all(type(other) is kind and len(other) == len(tree) for other in rest):
        parts = [_map(fn, *parts) for parts in zip(tree, *rest, strict=True)]
        return kind(parts) if kind is list or kind is tuple else kind(*parts)
    return pytree.tree_map(fn, tree, *rest)


def nones(like: Tree) -> Tree:
    """Return the tree with None for every leaf."""
    return map(lambda _: None, like)


def leaves(tree: Tree) -> list[Any]:
    """Return the leaves in order: of a dict in that of its keys' insertion."""
    if torch.compiler.is_compiling():
        return pytree.tree_leaves(tree)
    found: list[Any] = []
    _collect(tree, found)
    return found


def _collect(tree: Tree, found: list[Any]) -> None:
    kind = type(tree)
    if kind in _LEAVES:
        found.append(tree)
    elif kind is dict:
        if _all_leaves(builtins.map(type, tree.values())):
            found += tree.values()
        else:
            for value in tree.values():
                _collect(value, found)
    elif _is_row(kind):
        for value in tree:
            _collect(value, found)
    else:
        found += pytree.tree_leaves(tree)


def _is_row(kind: type) -> bool:
    """Return True for lists, tuples and named tuples.

    A named tuple does not count if torch was told another way to take it apart.
    """
    return (
        kind is list
        or kind is tuple
        or (pytree.is_namedtuple_class(kind) and kind not in pytree.SUPPORTED_NODES)
    )


def unflatten(structure: Structure, leaves: Sequence[Any]) -> Tree:
    """Return the tree with this structure and these leaves."""
    return pytree.tree_unflatten(list(leaves), structure)


def with_leaves(tree: Tree, leaves: Iterable[Any]) -> Tree:
    """Return the tree with other leaves, in their order.

    This takes a third of the time of torch's flattening and unflattening.
    """
    if torch.compiler.is_compiling():
        return pytree.tree_unflatten(list(leaves), pytree.tree_structure(tree))
    # Flat ones, which are most: without a call for each leaf.
    if type(tree) is dict and _all_leaves(builtins.map(type, tree.values())):
        return dict(zip(tree, leaves, strict=True))
    if type(tree) is list and _all_leaves(builtins.map(type, tree)):
        return [leaf for _, leaf in zip(tree, leaves, strict=True)]
    each = iter(leaves)
    return _map(lambda _: next(each), tree)


def leaves_like(like: Tree, tree: Tree, what: str) -> list[Any]:
    """Return the leaves of `tree`, which must have the structure of another.

    Raises:
        ValueError: `tree` has another structure; `what` names it in the message.
    """
    if not torch.compiler.is_compiling():
        if type(like) is type(tree) is dict and [*like] == [*tree]:
            found = [*tree.values()]
            if _all_leaves(builtins.map(type, found)) and _all_leaves(
                builtins.map(type, like.values())
            ):
                return found
        if is_alike(like, tree):
            return leaves(tree)
    return flatten_like(pytree.tree_structure(like), tree, what)


def flatten_like(structure: Structure, tree: Tree, what: str) -> list[Any]:
    """Return the leaves of `tree`, which must have the given structure.

    Raises:
        ValueError: `tree` has another structure; `what` names it in the message.
    """
    found, own = pytree.tree_flatten(tree)
    if own != structure:
        expected = {
            name for name, _ in named_leaves(unflatten(structure, range(structure.num_leaves)))
        }
        given = {name for name, _ in named_leaves(tree)}
        missing, unknown = sorted(expected - given), sorted(given - expected)
        differs = f"missing {missing}, unknown {unknown}"
        if not missing and not unknown:
            differs = "the same names in another order, or other kinds of nodes"
        raise ValueError(
            f"`{what}` does not have the expected structure: {differs}. Build it from the same "
            "tree, in the same order."
        )
    return found


def is_alike(one: Tree, other: Tree) -> bool:
    """Return True if two trees have one structure, keys of dicts in one order."""
    kind = type(one)
    if kind in _LEAVES:
        return type(other) in _LEAVES
    if kind is dict:
        if type(other) is not dict or list(one) != list(other):
            return False
        return all(
            (type(value) in _LEAVES and type(other[key]) in _LEAVES) or is_alike(value, other[key])
            for key, value in one.items()
        )
    if _is_row(kind):
        return (
            type(other) is kind
            and len(one) == len(other)
            and all(is_alike(*pair) for pair in zip(one, other, strict=True))
        )
    return bool(flatten(one)[1] == flatten(other)[1])


def is_any_tracked(tree: Tree) -> bool:
    """Return True if autograd or `torch.func.grad` differentiates through some tensor."""
    return any(isinstance(leaf, Tensor) and is_tracked(leaf) for leaf in leaves(tree))


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Return (path, leaf) pairs.

    The path reads like Python indexing, for example `['net.0.weight']`.
    """
    return [
        (pytree.keystr(path) or "the tensor itself", leaf)
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
    ]


def leading_axes(tree: Tree) -> dict[str, int]:
    """Return path -> length of the leading axis for every leaf.

    It is -1 for a leaf that has none, or is not a tensor.
    """
    return {
        path: len(leaf) if isinstance(leaf, Tensor) and leaf.ndim else -1
        for path, leaf in named_leaves(tree)
    }


def stack(trees: Sequence[Tree]) -> Tree:
    """Stack trees of one structure along a new leading axis of every leaf."""
    return map(lambda *tensors: torch.stack(tensors), *trees)


def index(tree: Tree, i: Any) -> Tree:
    """Index the leading axis of every leaf."""
    return map(lambda leaf: leaf[i], tree)


def ravel(tree: Tree) -> Tensor:
    """Return all entries in a row, [n], in the promoted dtype of the leaves.

    A complex entry counts as two real ones.
    """
    return torch.cat([as_real(leaf).reshape(-1) for leaf in leaves(tree)])


def unravel(vector: Tensor, like: Tree) -> Tree:
    """Return the tree with these entries, and the structure, shapes and dtypes of `like`."""
    template = leaves(like)
    parts = vector.split([leaf.numel() * (1 + leaf.is_complex()) for leaf in template])
    return with_leaves(
        like, [_shaped(part, leaf) for part, leaf in zip(parts, template, strict=True)]
    )


def norm(tree: Tree) -> Tensor:
    """Return the Euclidean norm of all entries together.

    It is real also of complex ones, and its derivative is 0 where the norm is 0.
    """
    found = leaves(tree)
    # In one pass and without a copy.
    if is_unrecorded() and not any(leaf.dtype in _HALF for leaf in found):
        return gather_whole(torch.linalg.vector_norm(torch.stack(foreach_norm(found))))
    return safe_sqrt(gather_whole(sum_leaves(lambda leaf: as_real(leaf).square().sum(), tree)))


def sum_leaves(fn: Callable[[Tensor], Tensor], tree: Tree) -> Tensor:
    """Return the sum of `fn(leaf)` over the leaves; at least one leaf is needed."""
    first, *rest = [fn(leaf) for leaf in leaves(tree)]
    for term in rest:
        first = first + term
    return first


def scaled_sum(x: Tensor, scale: float | Tensor, y: Tensor) -> Tensor:
    """Return x + scale y, in one operation where the scale is a number.

    Not under a compiler: inductor makes `addmm` of a sum with a matrix product, and forgets `alpha`
    (torch before 2.15).
    """
    if isinstance(scale, Tensor) or torch.compiler.is_compiling():
        return x + scale * y
    return torch.add(x, y, alpha=scale)


def scaled_sums(xs: list[Tensor], scale: float | Tensor, ys: list[Tensor]) -> list[Tensor]:
    """Return x + scale y for each."""
    if not isinstance(scale, Tensor) and is_unrecorded():
        return list(foreach_add(xs, ys, alpha=scale))
    return [scaled_sum(x, scale, y) for x, y in zip(xs, ys, strict=True)]


def safe_sqrt(x: Tensor) -> Tensor:
    """Return sqrt(x), with every derivative 0, not infinite, at x = 0; nan of nan and below 0.

    The inner `where` keeps the infinite slope out of the graph, the outer one restores the value.
    """
    if is_unrecorded():
        return x.sqrt()
    has_slope = x != 0
    return torch.where(has_slope, torch.where(has_slope, x, 1).sqrt(), 0)


def as_real(leaf: Tensor) -> Tensor:
    """Return a complex tensor as a real one with a last axis for (real, imaginary).

    A real tensor is returned as it is. No view of it: torch's derivative of `view_as_real` refuses
    a cotangent that begins at an odd place, as one out of `cat` may.
    """
    return torch.stack([leaf.real, leaf.imag], -1) if leaf.is_complex() else leaf


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    return (
        as_complex(part.reshape(*like.shape, 2)) if like.is_complex() else part.reshape(like.shape)
    ).to(like.dtype)


def as_complex(leaf: Tensor) -> Tensor:
    """Return the complex tensor that `as_real` made this one of."""
    return torch.complex(*leaf.unbind(-1))
