"""Finding tensors that a loss reaches behind its arguments' back."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from metaopt import tree
from metaopt._functional import Functional
from metaopt.autodiff.graph import find_ancestors
from metaopt.autodiff.replay import drawn_again
from metaopt.torch_internals import is_wrapped
from metaopt.transforms import is_tracked
from metaopt.tree import Tree

OF_LOSS = (
    "`loss_fn` reaches {} through its closure, and that requires grad. Only explicit arguments are "
    "differentiated. Pass it as `meta`: `minimize(loss_fn, ..., meta=w)` with `loss_fn(params, "
    "batch, meta)`; or detach it."
)
OF_OPTIMIZER = (
    "the optimizer reaches {}, which requires grad and is not its own: it would get no derivative. "
    "Make it an `nn.Parameter` of the optimizer or the schedule, or store it with "
    "`set_hyperparameter` or `set_value`; or detach it."
)


def check_closure(
    loss: Callable[..., Tree], source: Any, *arguments: Any, message: str = OF_LOSS
) -> None:
    """Raise if `loss(*arguments)` depends on anything that is not among its arguments.

    Looked for are tensors that require grad, and random generators. The loss is evaluated once with
    every argument detached: a result that still requires grad has another source. One that the loss
    makes itself does not count: a hook may ask activations to require grad, as that of Hugging Face
    models does. The global random state is put back. Cost: one forward pass.

    Args:
        loss: the function to evaluate; it returns a tree of tensors.
        source: the user's functions or modules, searched for the tensor's name.
        arguments: trees of tensors.
        message: of the error, with a place for the tensor's name.

    Raises:
        ValueError: there is such a tensor, which the message names, or generator.
    """
    # Not the tensors themselves: a loss may mark its arguments as requiring grad.
    detached = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, arguments)

    def evaluate() -> list[Tensor]:
        found = tree.leaves(loss(*detached))
        return [leaf for leaf in found if isinstance(leaf, Tensor) and is_tracked(leaf)]

    with drawn_again(arguments), _NoGenerator():
        hidden = find_hidden(evaluate(), evaluate)
    if hidden is not None:
        raise ValueError(message.format(name_tracked(source, hidden)))


class _NoGenerator(TorchFunctionMode):
    """Refuses to draw from a `torch.Generator` given by hand."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("generator") is not None:
            raise ValueError(
                f"`loss_fn` draws from a torch.Generator of its own (`{func.__name__}`). A step "
                "that is run again on the way back would draw other numbers. Draw from the global "
                "generator, which is wound back, or pass the numbers in `batches`."
            )
        return func(*args, **(kwargs or {}))


def find_hidden(
    values: Sequence[Tensor], again: Callable[[], Sequence[Tensor]], known: Sequence[Tensor] = ()
) -> Tensor | None:
    """Return one of the values that was computed from a hidden leaf that requires grad, or None.

    Leaves that computing the values makes are not hidden: a gradient penalty makes its input one,
    and a hook of Hugging Face models its activations. They are others when the values are computed
    again.

    Args:
        values: tracked tensors.
        again: computes them once more; called only if something looks hidden.
        known: leaves that are not hidden.
    """
    # By id, since tensors compare entry by entry. The dicts keep them alive, so that no id is used
    # twice.
    beside = {id(leaf) for leaf in known}
    found = [
        (value, {id(leaf): leaf for leaf in find_leaves(value) if id(leaf) not in beside})
        for value in values
    ]
    # A tensor at a level of `torch.func` has no graph to follow: what it depends on is outside.
    wrapped = next((value for value in values if is_wrapped(value)), None)
    if wrapped is not None or not any(leaves for _, leaves in found):
        return wrapped
    then = {id(leaf): leaf for value in again() for leaf in find_leaves(value)}
    return next((value for value, leaves in found if leaves.keys() & then.keys()), None)


def name_tracked(source: Any, value: Tensor) -> str:
    """Name the tracked tensors in the closure of `source` that `value` was computed from.

    Args:
        source: a function or module, or several in a tuple.
        value: a tracked tensor.
    """
    sources = source if isinstance(source, tuple) else (source,)
    found = [pair for one in sources for pair in find_reachable(one)]
    tracked = [(name, tensor) for name, tensor in found if is_tracked(tensor)]
    # A leaf is among the ancestors by itself, any other tensor by the node that made it.
    below = find_ancestors(value).keys()
    used = [pair for pair in tracked if below & {id(pair[1]), id(pair[1].grad_fn)}]
    names = {f"`{name}` (shape {tuple(tensor.shape)})" for name, tensor in used or tracked}
    return ", ".join(sorted(names)) or f"a tensor (last operation: {type(value.grad_fn).__name__})"


def find_leaves(value: Tensor) -> list[Tensor]:
    """Return the leaf tensors that a value was computed from, as far as autograd recorded it."""
    return [
        found
        for found in find_ancestors(value).values()
        if isinstance(found, Tensor) and found.is_leaf
    ]


def find_reachable(
    value: Any, name: str = "", seen: set[int] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) for what a function or an object reaches besides its arguments.

    Closures, globals, attributes and items are followed.
    """
    seen = set() if seen is None else seen
    # What is in a `Functional` is passed to it; classes and modules of Python lead everywhere.
    if id(value) in seen or isinstance(value, Functional | type | types.ModuleType):
        return
    seen.add(id(value))
    members: dict[str, Any] = {}
    prefix = f"{name}." if name else ""
    match value:
        case Tensor():
            yield name, value
        case nn.Module():
            named = [*value.named_parameters(), *value.named_buffers()]
            members = {prefix + key: tensor for key, tensor in named}
        case types.FunctionType():
            known = value.__globals__
            members = {key: known[key] for key in _names_in(value.__code__) if key in known}
            cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
            members |= {key: cell.cell_contents for key, cell in cells if cell != types.CellType()}
        case types.MethodType():
            members = {"self": value.__self__, "function": value.__func__}
        case functools.partial():
            given: list[tuple[Any, Any]] = [("function", value.func), *enumerate(value.args)]
            given += value.keywords.items()
            members = {f"{prefix}{key}": item for key, item in given}
        case dict():
            members = {f"{name}[{key!r}]": item for key, item in value.items()}
        case list() | tuple():
            members = {f"{name}[{index}]": item for index, item in enumerate(value)}
        case _ if hasattr(value, "__dict__"):
            members = {prefix + key: item for key, item in vars(value).items()}
    for key, member in members.items():
        yield from find_reachable(member, key, seen)


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes in a function, its comprehensions included."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return {*code.co_names}.union(*map(_names_in, inner))
