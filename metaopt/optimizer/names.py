"""Choosing parameters by their names."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from metaopt.torch_internals import mark_constant_when_compiled, pytree
from metaopt.tree import Tree


def paths(params: Tree) -> dict[str, Any]:
    """Return name -> leaf: dict keys, list indices and fields, joined by dots.

    A tensor by itself is named ''.
    """
    found, _ = pytree.tree_flatten_with_path(params)
    names = [".".join(str(_key(entry)) for entry in path) for path, _ in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(
            f"Parameters must have names of their own, got {twice} for two of them. Rename a key."
        )
    return dict(zip(names, (leaf for _, leaf in found), strict=True))


def choose(
    owner: nn.Module, what: str, patterns: tuple[str, ...], names: Iterable[str], *, rest: bool
) -> list[list[str]]:
    """Return for each pattern the names that match it and none before it.

    Args:
        owner: whose `what` has the patterns, for messages.
        what: the argument's name.
        patterns: as in `fnmatch`.
        names: to choose from.
        rest: whether there may be names that match no pattern.

    Raises:
        ValueError: there is such a name, or a pattern that gets none.
    """
    chosen: list[list[str]] = [[] for _ in patterns]
    for name in names:
        first = _first(patterns, name)
        if first is not None:
            chosen[first].append(name)
        elif not rest:
            raise ValueError(
                f"{type(owner).__name__}: no pattern of `{what}` matches the parameter {name!r}, "
                f'got {list(patterns)}. Add a last group "*".'
            )
    for pattern, own in zip(patterns, chosen, strict=True):
        if not own:
            raise ValueError(
                f"{type(owner).__name__}: the pattern {pattern!r} of `{what}` gets no parameter of "
                f"{list(names)}. Leave it out, or put it before the more general ones."
            )
    return chosen


@mark_constant_when_compiled  # a compiler sees the index, not how patterns work
def _first(patterns: tuple[str, ...], name: str) -> int | None:
    """Return the index of the first pattern that matches."""
    return next((i for i, pattern in enumerate(patterns) if fnmatchcase(name, pattern)), None)


def _key(entry: Any) -> Any:
    """Return the dict key, the index or the field of a step of a path."""
    match entry:
        case pytree.SequenceKey():
            return entry.idx
        case pytree.GetAttrKey():
            return entry.name
    return entry.key
