"""A tree of tensors and plain values in a file, read back without running anything in it.

Tensors are stored as safetensors. The structure around them is JSON, in which numbers, texts, truth
values and None stand for themselves, a list for a list, and an object with one key for the rest:

    {"float": "nan"}                  inf and nan
    {"complex": [re, im]}             a complex number
    {"tuple": [...]}                  a tuple
    {"named": [class, fields, [...]]} a named tuple
    {"dict": [[key, value], ...]}     a dict, in its order
    {"tensor": [i, device]}           tensor i; where one stands at two places, i does
    {"array": i}                      tensor i as an array of numpy
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metaopt.scan import tensor_file

MOST_BYTES = 2**28  # of JSON, whatever size a file says it has
STRUCTURE = "structure"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another training."""


def write_state(path: Path, state: Any, facts: Mapping[str, str]) -> None:
    """Write a tree, and facts that `read_facts` of `tensor_file` returns without it.

    Raises:
        TypeError: it holds something else than tensors, numpy arrays, numbers, texts, truth values
            and None in dicts, lists, tuples and named tuples; the message has its path.
        OSError: see `tensor_file.write`.
    """
    tensors: list[Tensor] = []
    text = json.dumps(_Encoder(tensors).encode(state, ""), separators=(",", ":")).encode()
    named = {str(place): tensor for place, tensor in enumerate(tensors)}
    # as a tensor: it is then part of the checksum, and headers have a size limit
    named[STRUCTURE] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    try:
        tensor_file.write(path, named, facts)
    except (KeyError, SafetensorError) as error:
        dtypes = sorted({str(tensor.dtype) for tensor in tensors})
        raise TypeError(
            f"A state has tensors of a dtype that safetensors cannot store, among {dtypes}: "
            f"{error}. Keep it as another dtype."
        ) from error


def read_state(path: Path, remedy: str) -> Any:
    """Return the tree that `write_state` wrote; tensors of a device that is not here on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is damaged or was not written by `write_state`;
            the message ends with the remedy.
    """
    try:
        tensors, _ = tensor_file.read(path, remedy)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {remedy}") from error
    try:
        text = tensors.pop(STRUCTURE)
        if text.dtype != torch.uint8 or text.ndim != 1 or len(text) > MOST_BYTES:
            raise ValueError(f"its structure is a {text.dtype} of shape {tuple(text.shape)}")
        node = json.loads(text.numpy().tobytes())
        return _Decoder([tensors[str(place)] for place in range(len(tensors))]).decode(node)
    # whatever JSON there is in it
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} must be a checkpoint, got a file with another content: {error!r}. {remedy}"
        ) from error


class _Encoder:
    """Turns a tree into JSON, and collects its tensors, each once."""

    def __init__(self, tensors: list[Tensor]):
        self._tensors = tensors
        self._places: dict[int, int] = {}

    def encode(self, value: Any, path: str) -> Any:
        match value:
            case Tensor():
                return {"tensor": [self._place(value, path), value.device.type]}
            case np.ndarray():
                return {"array": self._place(torch.tensor(np.ascontiguousarray(value)), path)}
            case None | bool() | str():
                return value
            case int():
                return int(value)
            case float():
                return float(value) if math.isfinite(value) else {"float": str(float(value))}
            case complex():
                return {"complex": [self.encode(part, path) for part in (value.real, value.imag)]}
            case dict():
                pairs = [
                    [self.encode(key, path), self.encode(item, f"{path}[{key!r}]")]
                    for key, item in value.items()
                ]
                return {"dict": pairs}
            case list():
                return self._encode_row(value, path)
            case tuple() if hasattr(value, "_fields"):
                kind = f"{type(value).__module__}.{type(value).__qualname__}"
                return {"named": [kind, list(value._fields), self._encode_row(value, path)]}
            case tuple():
                return {"tuple": self._encode_row(value, path)}
        raise TypeError(
            f"A state must hold tensors, numpy arrays, numbers, texts and None in dicts, lists and "
            f"tuples, got {type(value).__name__} at {path or 'its top'}. Of a `torch.Generator` "
            "store `get_state()`, of an object what it is made of."
        )

    def _encode_row(self, values: list[Any] | tuple[Any, ...], path: str) -> list[Any]:
        return [self.encode(item, f"{path}[{i}]") for i, item in enumerate(values)]

    def _place(self, tensor: Tensor, path: str) -> int:
        if tensor.layout != torch.strided or type(tensor) not in (Tensor, nn.Parameter):
            raise TypeError(
                f"A state must hold dense tensors, got a {type(tensor).__name__} of layout "
                f"{tensor.layout} at {path}. Store `.to_dense()`, or its parts."
            )
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
        return self._places[id(tensor)]


class _Decoder:
    """Turns JSON into a tree with these tensors.

    A named tuple is made without a call of its class, which must be known already.
    """

    def __init__(self, tensors: list[Tensor]):
        self._tensors = tensors
        self._moved: dict[tuple[int, str], Tensor] = {}

    def decode(self, node: Any) -> Any:
        match node:
            case None | bool() | int() | float() | str():
                return node
            case list():
                return [self.decode(item) for item in node]
            case {"float": "inf" | "-inf" | "nan" as text}:
                return float(text)
            case {"complex": [real, imaginary]}:
                return complex(self.decode(real), self.decode(imaginary))
            case {"tuple": [*items]}:
                return tuple(self.decode(item) for item in items)
            case {"named": [str() as name, [*fields], [*items]]} if len(fields) == len(items):
                kind = _find_named_tuple(name, fields)
                return tuple.__new__(kind, [self.decode(item) for item in items])
            case {"dict": [*pairs]}:
                return {self.decode(key): self.decode(item) for key, item in pairs}
            case {"tensor": [int() as place, str() as device]}:
                return self._take(place, device)
            case {"array": int() as place}:
                return self._take(place, "cpu").numpy()
        raise ValueError(f"its structure has {str(node)[:80]!r}")

    def _take(self, place: int, device: str) -> Tensor:
        if place < 0:
            raise ValueError(f"its structure has tensor {place}")
        if (place, device) not in self._moved:
            here = device == "cpu" or (device == "cuda" and torch.cuda.is_available())
            self._moved[place, device] = self._tensors[place].to(device if here else "cpu")
        return self._moved[place, device]


def _find_named_tuple(name: str, fields: list[Any]) -> type[tuple[Any, ...]]:
    """Return the class of this name among the ones that are imported.

    Raises:
        ValueError: there is none with these fields.
    """
    pending: list[type[tuple[Any, ...]]] = [tuple]
    while pending:
        for kind in pending.pop().__subclasses__():
            found = f"{kind.__module__}.{kind.__qualname__}"
            if found == name and fields == [*getattr(kind, "_fields", ())]:
                return kind
            pending.append(kind)
    raise ValueError(
        f"it has a named tuple {name[:80]!r} with fields {str(fields)[:80]}, which is not known "
        "here; import the module that defines it"
    )
