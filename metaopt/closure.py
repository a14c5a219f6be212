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
from metaopt.autodiff.graph import ancestors
from metaopt.functional import Functional
from metaopt.transforms import is_functorch_wrapped, is_tracked
from metaopt.tree import Tree


def check_closure(loss: Callable[..., Tree], source: Any, *arguments: Any) -> None:
    """Raise if `loss(*arguments)` depends on what is none of its arguments: a tensor that requires grad, a random generator.

    The loss is evaluated once with every argument detached: a result that still requires grad has another source. One that the
    loss makes itself is none: a hook may ask activations to require grad, as that of Hugging Face models does. The
    global random state is put back. Cost: one forward pass.

    Args:
        loss: the function to evaluate; it returns a tree of tensors.
        source: the user's functions or modules, searched for the tensor's name.
        arguments: trees of tensors.

    Raises:
        ValueError: there is such a tensor, which the message names, or generator.
    """
    detached = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, arguments)
    devices = {leaf.device.index for leaf in tree.leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_cuda}
    with torch.random.fork_rng(devices=devices), _Observing() as observing:
        values = [leaf for leaf in tree.leaves(loss(*detached)) if isinstance(leaf, Tensor) and is_tracked(leaf)]
    hidden = next((value for value in values if has_other_sources(value, observing.made)), None)
    if hidden is not None:
        raise ValueError(
            f"`loss_fn` reaches {tracked_names(source, hidden)} through its closure, and that requires grad. Only explicit "
            "arguments are differentiated. Pass it as `meta`: `minimize(loss_fn, ..., meta=w)` with `loss_fn(params, batch, "
            "meta)`; or detach it."
        )


class Leaves(TorchFunctionMode):
    """Notes the tensors that begin to require grad while it is entered, in `made`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        asks = func in _ASKS or bool(kwargs and kwargs.get("requires_grad"))
        is_new = asks and not (func in _ASKS and args[0].requires_grad)
        result = func(*args, **(kwargs or {}))
        if is_new:
            self.made.append(args[0] if func in _ASKS else result)
        return result


_ASKS = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]


class _Observing(Leaves):
    """And refuses to draw from a `torch.Generator` given by hand."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        if kwargs and kwargs.get("generator") is not None:
            raise ValueError(
                f"`loss_fn` draws from a torch.Generator of its own (`{func.__name__}`). A step that is run again on the way back "
                "would draw other numbers. Draw from the global generator, which is wound back, or pass the numbers in `batches`."
            )
        return super().__torch_function__(func, types, args, kwargs)


def has_other_sources(value: Tensor, made: Sequence[Tensor]) -> bool:
    """Return True if a tracked value was computed from other leaves that require grad than those in `made`."""
    if is_functorch_wrapped(value):
        return True
    known = {id(leaf) for leaf in made}
    return any(id(leaf) not in known for leaf in graph_leaves(value))


def tracked_names(source: Any, value: Tensor) -> str:
    """Name the tracked tensors in the closure of `source`, or of several in a tuple, that `value` was computed from."""
    sources = source if isinstance(source, tuple) else (source,)
    tracked = [(name, tensor) for one in sources for name, tensor in reachable(one) if is_tracked(tensor)]
    below = ancestors(value)
    used = [(name, tensor) for name, tensor in tracked if below.keys() & {id(tensor), id(tensor.grad_fn)}]
    names = {f"`{name}` (shape {tuple(tensor.shape)})" for name, tensor in used or tracked}
    return ", ".join(sorted(names)) or f"a tensor (last operation: {type(value.grad_fn).__name__})"


def graph_leaves(value: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a value was computed from, as far as autograd recorded it."""
    return [found for found in ancestors(value).values() if isinstance(found, Tensor) and found.is_leaf]


def reachable(value: Any, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for what a function or an object reaches besides arguments: closures, globals, attributes, items."""
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
            members = {prefix + key: tensor for key, tensor in [*value.named_parameters(), *value.named_buffers()]}
        case types.FunctionType():
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            members = {key: value.__globals__[key] for key in value.__code__.co_names if key in value.__globals__}
            members |= {key: cell.cell_contents for key, cell in cells if cell != types.CellType()}
        case types.MethodType():
            members = {"self": value.__self__, "function": value.__func__}
        case functools.partial():
            members = {
                f"{prefix}{key}": item for key, item in [("function", value.func), *enumerate(value.args), *value.keywords.items()]
            }
        case dict():
            members = {f"{name}[{key!r}]": item for key, item in value.items()}
        case list() | tuple():
            members = {f"{name}[{index}]": item for index, item in enumerate(value)}
        case _ if hasattr(value, "__dict__"):
            members = {prefix + key: item for key, item in vars(value).items()}
    for key, member in members.items():
        yield from reachable(member, key, seen)
