"""A second body for a module: the same behaviour, other tensors."""

from __future__ import annotations

import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.torch_internals import COMPILED_CALL

Place = tuple[Any, Any]  # where a tensor stands: a dict and a key of it, or a list and an index


class Twins:
    """The twins of all modules below `root`.

    It is as if each had been built a second time, with tensors of its own. What a module holds is
    taken over: numbers and other objects are shared, while lists, tuples and dicts (registered
    members and hooks among them) are rebuilt, and in them modules become their twins; so do modules
    inside bound methods and in what functions close over. Parameters are left for the caller to
    fill in, at `places`; a buffer is copied.

    Args:
        root: the module; it is only read.
        parameters: the distinct tensors in it that take other values in the twins.
        kind: maps a module to the class of its twin.
        device: where the copies of the buffers are, by default where the buffers are.

    Raises:
        ValueError: a module has a `forward` of its own in place of its class's, or keeps a
            parameter where it cannot be replaced.
    """

    def __init__(
        self,
        root: nn.Module,
        parameters: Sequence[Tensor],
        kind: Callable[[nn.Module], type[nn.Module]],
        device: torch.device | str | None = None,
    ):
        self.places: list[list[Place]] = [[] for _ in parameters]
        self.buffers: list[Place] = []
        self._parameter_at = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._buffer_at = {id(buffer): index for index, buffer in enumerate(root.buffers())}
        self._copies = [buffer.detach().to(device, copy=True) for buffer in root.buffers()]
        modules = list(root.modules())
        self._done: dict[int, Any] = {
            id(module): object.__new__(kind(module)) for module in modules
        }
        for module in modules:
            if "forward" in vars(module):
                raise ValueError(
                    f"The {type(module).__name__} to patch has a `forward` of its own, that of "
                    "another object or compiled. It would go on using the original parameters. "
                    "Define `forward` in the class; compile after patching."
                )
            twin = vars(self._done[id(module)])
            self._fill(vars(module), twin, vars(module).items())
            twin.pop(COMPILED_CALL, None)  # it calls the original
        self.root: Any = self._done[id(root)]

    def _translate(self, value: Any) -> Any:
        """Return what stands for `value` in the twins.

        Where parameters and buffers stand is noted.
        """
        if id(value) in self._done:
            return self._done[id(value)]
        if type(value) in (dict, OrderedDict):
            return self._fill(value, type(value)(), value.items())
        if type(value) is list:
            return self._fill(value, [None] * len(value), enumerate(value))
        if type(value) is tuple:
            return tuple(self._movable(item) for item in value)
        if isinstance(value, types.MethodType):
            return types.MethodType(value.__func__, self._translate(value.__self__))
        if isinstance(value, types.FunctionType) and value.__closure__:
            return self._rebound(value, value.__closure__)
        return value

    def _fill(self, source: Any, target: Any, items: Iterable[tuple[Any, Any]]) -> Any:
        self._done[id(source)] = target  # first, for its items may hold it
        for key, item in items:
            if id(item) in self._parameter_at:
                self.places[self._parameter_at[id(item)]].append((target, key))
                target[key] = None
            elif id(item) in self._buffer_at:
                self.buffers.append((target, key))
                target[key] = self._copies[self._buffer_at[id(item)]]
            else:
                target[key] = self._translate(item)
        return target

    def _movable(self, item: Any) -> Any:
        """Return what stands for an item of a tuple."""
        if id(item) in self._parameter_at:
            raise ValueError(
                f"A module keeps a parameter of shape {tuple(item.shape)} in a tuple or in the "
                "closure of a function, where another cannot take its place. Keep it in a list, a "
                "dict or an attribute."
            )
        return self._translate(item)

    def _rebound(
        self, function: types.FunctionType, cells: tuple[types.CellType, ...]
    ) -> types.FunctionType:
        """Return the function, closing over the twins of the modules.

        All other variables are the same ones.
        """
        replaced = [self._cell(cell) for cell in cells]
        if all(new is old for new, old in zip(replaced, cells, strict=True)):
            return function
        twin = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(replaced),
        )
        twin.__kwdefaults__ = function.__kwdefaults__
        return twin

    def _cell(self, cell: types.CellType) -> types.CellType:
        if cell == types.CellType():  # a variable that is not set yet
            return cell
        content = cell.cell_contents
        if isinstance(content, nn.Module | types.MethodType | Tensor):
            twin = self._movable(content)
            return cell if twin is content else types.CellType(twin)
        return cell


_classes: weakref.WeakValueDictionary[tuple[type, type], type] = weakref.WeakValueDictionary()


def subclass(mixin: type[nn.Module], kind: type[nn.Module]) -> Any:
    """Return the class that is both, first the mixin.

    It is the same one each time, since making a class is slow.
    """
    found = _classes.get((mixin, kind))
    if found is None:
        name = f"Functional{kind.__name__}"
        found = types.new_class(
            name,
            (mixin, kind),
            exec_body=lambda body: body.update(__module__=kind.__module__, __doc__=kind.__doc__),
        )
        _classes[mixin, kind] = found
    return found
