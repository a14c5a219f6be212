"""Modules that can be written to a file and read back.

Weights are written as safetensors, constructor arguments as JSON.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from metaopt.checks import Limits
from metaopt.optimizer.text import shorten

FORMAT = "metaopt-1"


class Configurable(nn.Module):
    """A module that knows its constructor arguments: each is an attribute of the same name.

    An argument may be a number, a string, a bool, None, a tensor or parameter, another
    `Configurable`, or a tuple of these.
    """

    def config(self) -> dict[str, Any]:
        """Return {"class": name, "arguments": {...}} in JSON's types.

        Tensors appear as their kind, shape and dtype.
        """
        arguments = self._arguments()
        registered = set(map(id, (*self.parameters(False), *self.buffers(False))))
        for name, value in arguments.items():
            if isinstance(value, Tensor) and id(value) not in registered:
                raise TypeError(
                    f"{type(self).__name__}: the tensor `{name}` is neither parameter nor buffer, "
                    "so it would not be saved. Set it with `set_hyperparameter`."
                )
        return {
            "class": type(self).__name__,
            "arguments": {name: _describe(value) for name, value in arguments.items()},
        }

    def extra_repr(self) -> str:
        """Return the arguments, and learned scalars beside them; modules print themselves."""
        given = {name: getattr(self, name, None) for name in _names_of_arguments(type(self))}
        shown = {
            name: value
            for name, value in given.items()
            if isinstance(value, bool | int | float | str | Tensor | tuple)
        }
        rows = [value if isinstance(value, tuple) else (value,) for value in shown.values()]
        known = {id(item) for row in rows for item in row}
        for name, p in self.named_parameters(recurse=False):
            if not p.ndim and id(p) not in known:
                shown[name] = p
        return ", ".join(f"{name}={shorten(value)}" for name, value in shown.items())

    def _arguments(self) -> dict[str, Any]:
        names = _names_of_arguments(type(self))
        missing = [name for name in names if not hasattr(self, name)]
        if missing:
            raise TypeError(
                f"{type(self).__name__}: every argument of the constructor must be an attribute of "
                f"the same name, to be saved; missing {missing}. Write self.{missing[0]} = "
                f"{missing[0]}."
            )
        return {name: getattr(self, name) for name in names}

    def save(self, path: str | Path) -> None:
        """Write all tensors as safetensors, with the configuration in the file's header.

        The folder is made if need be.

        Raises:
            ValueError: a tensor has an entry that is not finite.
            TypeError: an argument of the constructor is not an attribute, or cannot be saved.
        """
        path = Path(path)
        for name, tensor in self.state_dict().items():
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{type(self).__name__}: the tensor {name!r} has entries that are not finite, "
                    f"so {path} is not written. They would spread to all that is updated. Save "
                    "what was there before, and lower the learning rate."
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        # safetensors refuses tensors that share memory or are not contiguous.
        tensors = {
            name: tensor.detach().contiguous().clone() for name, tensor in self.state_dict().items()
        }
        header = {"format": FORMAT, "config": json.dumps(self.config())}
        path.write_bytes(safetensors.torch.save(tensors, metadata=header))

    @classmethod
    def load(cls, path: str | Path, *, device: torch.device | str = "cpu") -> Self:
        """Read a module that `save` wrote.

        Only classes that are imported and derive from `cls` are built; nothing is unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not safetensors, was not written by `save`, names an unknown
                class, has arguments that the class refuses, or its tensors do not fit the class,
                have several precisions where the class has one, or are not finite.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"No weights file at {path}. Give the path that `save` wrote.")
        try:
            with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path} is not a safetensors file ({error}). Write it again with `save`."
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} has format {metadata.get('format')!r}, expected {FORMAT!r}. Write it with "
                "`save`."
            )
        try:
            with torch.device("meta"):  # allocates nothing, whatever sizes the file asks for
                module = _build(json.loads(metadata.get("config", "")), path)
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} has a configuration from which nothing can be built: {error}"
            ) from error
        if not isinstance(module, cls):
            raise ValueError(
                f"{path} holds a {type(module).__name__}, not a {cls.__name__}. Use "
                f"`{type(module).__name__}.load`."
            )
        _check_tensors(path, module, tensors)
        # The sizes are those of the file's tensors: now it is safe to allocate, and constants that
        # are not saved become real. What stands for the file's tensors stays on "meta": there its
        # numbers are not checked.
        module = _build(json.loads(metadata["config"]), path)
        module.load_state_dict(tensors, assign=True)
        try:
            _check_limits(module)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} has a tensor that its class refuses: {error}") from error
        loaded: Self = module.to(device)
        return loaded


def known_classes() -> dict[str, list[type[Configurable]]]:
    """Return every imported class that a weights file may name, by name."""
    known: dict[str, list[type[Configurable]]] = {}
    pending = [Configurable]
    while pending:
        for child in pending.pop().__subclasses__():
            known.setdefault(child.__name__, []).append(child)
            pending.append(child)
    return known


def store(owner: nn.Module, name: str, value: Any) -> None:
    """Set an attribute: a tensor becomes a buffer, so that it is saved, and an integer a float."""
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        owner.register_buffer(name, value)
    else:
        setattr(owner, name, float(value) if type(value) is int else value)


def note_limits(owner: nn.Module, name: str, limits: Limits) -> None:
    """Remember the limits of the attribute `name`, for what `load` puts there."""
    owner.__dict__.setdefault("_limits", {})[name] = limits


def _check_limits(module: nn.Module) -> None:
    """Raise ValueError if a number or tensor in a module is out of the limits it was given with."""
    for owner in module.modules():
        for name, limits in owner.__dict__.get("_limits", {}).items():
            if isinstance(value := getattr(owner, name), float | Tensor):
                limits.check(owner, name, value)


def _check_tensors(path: Path, module: Configurable, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if the tensors of a file do not fit the module that it describes."""
    own = module.state_dict(keep_vars=True)
    for name in sorted(own.keys() | tensors.keys()):
        expected = _kind(own[name]) if name in own else "absent"
        found = _kind(tensors[name]) if name in tensors else "absent"
        if expected != found:
            raise ValueError(
                f"{path} does not fit {type(module).__name__}: tensor {name!r} should be "
                f"{expected}, found {found}. The file was written by another version or "
                "configuration."
            )
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(
                f"{path} has entries that are not finite in the tensor {name!r}. They would spread "
                "to all that is updated. Take an earlier file."
            )
    known: dict[Any, tuple[str, torch.dtype]] = {}
    for name, tensor in tensors.items():
        # What the configuration describes has the precision it says. The rest of a part may have
        # been converted, but as one.
        is_described = hasattr(own[name], "is_described")
        part = name if is_described else (_part_of(module, name), own[name].dtype)
        first, expected_dtype = known.setdefault(
            part, (name, own[name].dtype if is_described else tensor.dtype)
        )
        if tensor.dtype != expected_dtype:
            like = "as its configuration says" if is_described else f"as {first!r}"
            raise ValueError(
                f"{path}: the tensor {name!r} should be of {expected_dtype}, {like}, found "
                f"{tensor.dtype}. What computes with both fails. Convert the whole module before "
                "it is saved: `module.to(dtype)`."
            )


def _part_of(module: nn.Module, name: str) -> str:
    """Return the path of the innermost `Configurable` that holds a tensor."""
    holders = [path for path, child in module.named_modules() if isinstance(child, Configurable)]
    own: str = max((path for path in holders if not path or name.startswith(f"{path}.")), key=len)
    return own


def _placeholder(shape: Any, dtype: str) -> Tensor:
    """Return what stands for a tensor of the file until it is read; nothing is allocated."""
    return torch.zeros(shape, dtype=getattr(torch, dtype), device="meta")


def _marked(tensor: Tensor) -> Tensor:
    tensor.is_described = True  # type: ignore[attr-defined]
    return tensor


def _names_of_arguments(kind: type) -> list[str]:
    return list(inspect.signature(kind.__init__).parameters)[1:]  # type: ignore[misc]


def _kind(tensor: Tensor) -> str:
    """Return what must agree between a file and a class; the precision need not."""
    dtype = "floating-point" if tensor.is_floating_point() else tensor.dtype
    return f"{dtype} {tuple(tensor.shape)}"


def _describe(value: Any) -> Any:
    match value:
        case Configurable():
            return value.config()
        case Tensor():
            kind = "parameter" if isinstance(value, nn.Parameter) else "tensor"
            return {kind: list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        case Mapping():
            return {"mapping": [[key, _describe(item)] for key, item in value.items()]}
        case tuple() | list():
            return [_describe(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
    raise TypeError(
        f"A constructor argument of type {type(value).__name__} cannot be saved: {value!r}. Use "
        "numbers, tensors or modules."
    )


def _build(value: Any, path: Path) -> Any:
    """Invert `_describe`; tensors come back as placeholders that `load_state_dict` replaces."""
    match value:
        case {"class": name, "arguments": arguments}:
            known = known_classes()
            if name not in known:
                raise ValueError(
                    f"{path} names the class {name!r}, which is not known; known are "
                    f"{sorted(known)}. Import the module that defines it; if it is one of this "
                    "library, write `import metaopt.optimizers`."
                )
            if len(known[name]) > 1:
                modules = sorted(cls.__module__ for cls in known[name])
                raise ValueError(
                    f"{path} names the class {name!r}, which {modules} define. Rename all but one."
                )
            return known[name][0](**{key: _build(item, path) for key, item in arguments.items()})
        case {"mapping": pairs}:
            return {key: _build(item, path) for key, item in pairs}
        case {"parameter": shape, "dtype": dtype}:
            return _marked(nn.Parameter(_placeholder(shape, dtype)))
        case {"tensor": shape, "dtype": dtype}:
            return _marked(_placeholder(shape, dtype))
        case list():
            return tuple(_build(item, path) for item in value)
    return value
