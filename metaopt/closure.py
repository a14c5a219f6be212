"""Finding tensors that a loss reaches behind its arguments' back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaopt import tree
from metaopt._functional import Functional
from metaopt.autodiff.graph import find_ancestors
from metaopt.torch_internals import is_wrapped
from metaopt.transforms import is_tracked
from metaopt.tree import Tree


def check_closure(loss: Callable[..., Tree], source: Any, *arguments: Any) -> None:
    """Raise if `loss(*arguments)` depends on what is none of its arguments: a tensor that requires
    grad, a random generator.

    The loss is evaluated once with every argument detached: a result that still requires grad has
    another source. One that the loss makes itself is none: a hook may ask activations to require
    grad, as that of Hugging Face models does. The global random state is put back. Cost: one
    forward pass.

    Args:
        loss: the function to evaluate; it returns a tree of tensors.
        source: the user's functions or modules, searched for the tensor's name.
        arguments: trees of tensors.

    Raises:
        ValueError: there is such a tensor, which the message names, or generator.
    """
    detached = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, arguments)
    devices = {
        leaf.device.index
        for leaf in tree.leaves(arguments)
        if isinstance(leaf, Tensor) and leaf.is_cuda
    }

    def evaluate() -> list[Tensor]:
        return [
            leaf
            for leaf in tree.leaves(loss(*detached))
            if isinstance(leaf, Tensor) and is_tracked(leaf)
        ]

    with torch.random.fork_rng(devices=devices), _NoGenerator():
        hidden = find_hidden(evaluate(), evaluate)
    if hidden is not None:
        raise ValueError(
            f"`loss_fn` reaches {tracked_names(source, hidden)} through its closure, and that "
            f"requires grad. Only explicit "
            "arguments are differentiated. Pass it as `meta`: `minimize(loss_fn, ..., meta=w)` "
            "with `loss_fn(params, batch, meta)`; or detach it."
        )


class _NoGenerator(TorchFunctionMode):
    """Refuses to draw from a `torch.Generator` given by hand."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Any = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs and kwargs.get("generator") is not None:
            raise ValueError(
                f"`loss_fn` draws from a torch.Generator of its own (`{func.__name__}`). A step "
                f"that is run again on the way back "
                "would draw other numbers. Draw from the global generator, which is wound back, or "
                "pass the numbers in `batches`."
            )
        return func(*args, **(kwargs or {}))


def find_hidden(
    values: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], known: Sequence[Tensor] = ()
) -> Tensor | None:
    """Return one of the values that was computed from a hidden leaf that requires grad; None if
    there is none.

    Leaves that computing the values makes are not hidden: a gradient penalty makes its input one,
    and a hook of Hugging Face models its activations. They are others when the values are computed
    again.

    Args:
        values: tracked tensors.
        again: computes them once more; called only if something looks hidden.
        known: leaves that are not hidden.
    """
    beside = {id(leaf) for leaf in known}
    found = [
        (value, {id(leaf): leaf for leaf in graph_leaves(value) if id(leaf) not in beside})
        for value in values
    ]
    wrapped = next((value for value in values if is_wrapped(value)), None)
    if wrapped is not None or not any(leaves for _, leaves in found):
        return wrapped
    then = {id(leaf): leaf for value in again() for leaf in graph_leaves(value)}
    return next((value for value, leaves in found if leaves.keys() & then.keys()), None)


def tracked_names(source: Any, value: Tensor) -> str:
    """Name the tracked tensors in the closure of `source`, or of several in a tuple, that `value`
    was computed from.
    """
    sources = source if isinstance(source, tuple) else (source,)
    tracked = [
        (name, tensor) for one in sources for name, tensor in reachable(one) if is_tracked(tensor)
    ]
    below = find_ancestors(value)
    used = [
        (name, tensor)
        for name, tensor in tracked
        if below.keys() & {id(tensor), id(tensor.grad_fn)}
    ]
    names = {f"`{name}` (shape {tuple(tensor.shape)})" for name, tensor in used or tracked}
    return ", ".join(sorted(names)) or f"a tensor (last operation: {type(value.grad_fn).__name__})"


def graph_leaves(value: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a value was computed from, as far as autograd recorded it."""
    return [
        found
        for found in find_ancestors(value).values()
        if isinstance(found, Tensor) and found.is_leaf
    ]


def reachable(
    value: Any, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for what a function or an object reaches besides arguments: closures,
    globals, attributes, items.
    """
    seen = set() if seen is None else seen
    if id(value) in seen or isinstance(value, Functional | type | types.ModuleType):
        return
    seen.add(id(value))
    members: dict[str, Any] = {}
    prefix = f"{name}." if name else ""
    match value:
        case Tensor():
            yield name, value
        case nn.Module():
            members = {
                prefix + key: tensor
                for key, tensor in [*value.named_parameters(), *value.named_buffers()]
            }
        case types.FunctionType():
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            members = {
                key: value.__globals__[key]
                for key in value.__code__.co_names
                if key in value.__globals__
            }
            members |= {key: cell.cell_contents for key, cell in cells if cell != types.CellType()}
        case types.MethodType():
            members = {"self": value.__self__, "function": value.__func__}
        case functools.partial():
            members = {
                f"{prefix}{key}": item
                for key, item in [
                    ("function", value.func),
                    *enumerate(value.args),
                    *value.keywords.items(),
                ]
            }
        case dict():
            members = {f"{name}[{key!r}]": item for key, item in value.items()}
        case list() | tuple():
            members = {f"{name}[{index}]": item for index, item in enumerate(value)}
        case _ if hasattr(value, "__dict__"):
            members = {prefix + key: item for key, item in vars(value).items()}
    for key, member in members.items():
        yield from reachable(member, key, seen)
