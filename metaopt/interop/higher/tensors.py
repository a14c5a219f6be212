"""What programs take from `higher.utils`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def flatten(tree: Any) -> list[Any]:
    """Return the leaves of nested dicts, lists, tuples and sets."""
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple | set):
        return [tree]
    return [leaf for branch in tree for leaf in flatten(branch)]


def get_func_params(module: nn.Module, device: Any = None, safe_copy: bool = True) -> list[Tensor]:
    """Return the module's parameters as leaves of a new graph.

    Each requires grad if the original does.

    Args:
        module: whose parameters.
        device: where they are to be, by default where they are.
        safe_copy: False: share memory with the originals.
    """
    return [leaf(param, device, copy=safe_copy) for param in module.parameters()]


def leaf(tensor: Tensor, device: Any = None, *, copy: bool = True) -> Tensor:
    """Return the tensor's value as a leaf of a new graph.

    It requires grad if the tensor does.
    """
    return tensor.detach().to(device, copy=copy).requires_grad_(tensor.requires_grad)


def map_leaves(fn: Callable[[Any], Any], tree: Any) -> Any:
    """Return the tree with `fn` applied to anything but a dict, list, tuple or set."""
    if isinstance(tree, dict):
        return {key: map_leaves(fn, branch) for key, branch in tree.items()}
    if isinstance(tree, list | tuple | set):
        return type(tree)(map_leaves(fn, branch) for branch in tree)
    return fn(tree)


def copied(value: Any, device: torch.device | str | None = None) -> Any:
    """Return a tree in which every tensor is a copy without a history."""
    return map_leaves(lambda x: leaf(x, device) if isinstance(x, Tensor) else x, value)


# The names that programs take from `higher.utils` although they begin with an underscore.


def _recursive_map(target: Any, map_fn: Callable[[Any], Any]) -> Any:
    return map_leaves(map_fn, target)


def _copy_tensor(t: Tensor, safe_copy: bool, device: torch.device | str | None = None) -> Tensor:
    return leaf(t, device, copy=safe_copy)


def _recursive_copy_and_cast(target: Any, device: torch.device | str | None) -> Any:
    return copied(target, device)


def _is_container(target: Any) -> bool:
    return isinstance(target, dict | list | tuple | set)


def _find_param_in_list(param: Tensor, l: Iterable[Tensor]) -> int | None:
    return next((index for index, other in enumerate(l) if other is param), None)
