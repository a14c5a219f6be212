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
    {"sharded": [i, dtype, shape, layout]}   tensor i of those that are spread over ranks
    {"shards": [files, ...]}          at the top: which files have those
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metaopt.distributed.shards import Files, describe_layout, make_room
from metaopt.scan import tensor_file
from metaopt.transforms import is_sharded, spread_like

MOST_BYTES = 2**28  # of JSON, whatever size a file says it has
STRUCTURE = "structure"


class CheckpointError(ValueError):
    """A checkpoint cannot be read, or belongs to another training."""


class OtherTrainingError(CheckpointError):
    """A checkpoint that can be read, of another training."""


Named = Mapping[str, Tensor]


def write_state(
    path: Path,
    state: Any,
    facts: Mapping[str, str],
    write_sharded: Callable[[Named], Files] | None = None,
) -> None:
    """Write a tree, and facts that `read_facts` of `tensor_file` returns without it.

    Args:
        path: the file.
        state: the tree.
        facts: the facts.
        write_sharded: writes tensors that are spread over ranks, before the file; without it they
            are refused.

    Raises:
        TypeError: it holds something else than tensors, numpy arrays, numbers, texts, truth values
            and None in dicts, lists, tuples and named tuples; the message has its path.
        OSError: see `tensor_file.write`.
    """
    tensors: list[Tensor] = []
    sharded: list[Tensor] = []
    node = _Encoder(tensors, None if write_sharded is None else sharded).encode(state, "")
    if sharded and write_sharded:
        node = {"shards": [write_sharded(_name(sharded)), node]}
    text = json.dumps(node, separators=(",", ":")).encode()
    named = _name(tensors)
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


def _name(tensors: list[Tensor]) -> dict[str, Tensor]:
    return {str(place): tensor for place, tensor in enumerate(tensors)}


def read_state(
    path: Path,
    remedy: str,
    like: Any = None,
    read_sharded: Callable[[Files, Named], None] | None = None,
) -> Any:
    """Return the tree that `write_state` wrote; tensors of a device that is not here on the CPU.

    Args:
        path: the file.
        remedy: the end of an error's message.
        like: a tree that says by its tensors how those at the same places are to be spread over
            ranks.
        read_sharded: fills tensors with what was written by `write_sharded`.

    Raises:
        OtherTrainingError: `like` has no such tensor where there is one that is spread over ranks.
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
        decoder = _Decoder([tensors[str(place)] for place in range(len(tensors))])
        match node:
            case {"shards": [dict() as files, inner]} if read_sharded:
                state = decoder.decode(inner, like)
                read_sharded(_check_files(files), decoder.sharded)
                return state
        return decoder.decode(node, like)
    except OtherTrainingError:
        raise
    # whatever JSON there is in it
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} must be a checkpoint, got a file with another content: {error!r}. {remedy}"
        ) from error


def _check_files(files: dict[str, Any]) -> Files:
    if not all(isinstance(checksum, str) for checksum in files.values()):
        raise ValueError(f"its shards are {str(files)[:80]}")
    return files


class _Encoder:
    """Turns a tree into JSON, and collects its tensors, each once.

    Those that are spread over ranks come into a list of their own; without one they are refused.
    """

    def __init__(self, tensors: list[Tensor], sharded: list[Tensor] | None):
        self._tensors, self._sharded = tensors, sharded
        self._places: dict[int, int] = {}

    def encode(self, value: Any, path: str) -> Any:
        match value:
            case Tensor() if self._sharded is not None and is_sharded(value):
                place = self._append(self._sharded, value)
                layout = describe_layout(value)
                return {"sharded": [place, str(value.dtype), list(value.shape), layout]}
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
        return self._append(self._tensors, tensor)

    def _append(self, tensors: list[Tensor], tensor: Tensor) -> int:
        if id(tensor) not in self._places:
            self._places[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return self._places[id(tensor)]


class _Decoder:
    """Turns JSON into a tree with these tensors.

    A named tuple is made without a call of its class, which must be known already.

    Attributes:
        sharded: the tensors that are spread over ranks, by name, still to be filled.
    """

    def __init__(self, tensors: list[Tensor]):
        self._tensors = tensors
        self._moved: dict[tuple[int, str], Tensor] = {}
        self.sharded: dict[str, Tensor] = {}

    def decode(self, node: Any, like: Any = None) -> Any:
        """Return the tree; `like` has at the same places what its tensors are to be like."""
        match node:
            case None | bool() | int() | float() | str():
                return node
            case list():
                return self._decode_row(node, like)
            case {"float": "inf" | "-inf" | "nan" as text}:
                return float(text)
            case {"complex": [real, imaginary]}:
                return complex(self.decode(real), self.decode(imaginary))
            case {"tuple": [*items]}:
                return tuple(self._decode_row(items, like))
            case {"named": [str() as name, [*fields], [*items]]} if len(fields) == len(items):
                kind = _find_named_tuple(name, fields)
                return tuple.__new__(kind, self._decode_row(items, like))
            case {"dict": [*pairs]}:
                keys = [self.decode(key) for key, _ in pairs]
                own = like if isinstance(like, Mapping) else {}
                return {
                    key: self.decode(item, own.get(key))
                    for key, (_, item) in zip(keys, pairs, strict=True)
                }
            case {"tensor": [int() as place, str() as device]}:
                return spread_like(self._take(place, device), like)
            case {"sharded": [int() as place, str() as dtype, [*shape], [[*_], [*_]] as layout]}:
                return self._make_room(place, dtype, shape, layout, like)
            case {"array": int() as place}:
                return self._take(place, "cpu").numpy()
        raise ValueError(f"its structure has {str(node)[:80]!r}")

    def _decode_row(self, items: list[Any], like: Any) -> list[Any]:
        own = list(like) if isinstance(like, list | tuple) else []
        own += [None] * (len(items) - len(own))
        return [self.decode(item, one) for item, one in zip(items, own, strict=False)]

    def _make_room(
        self, place: int, dtype: str, shape: list[Any], layout: list[Any], like: Any
    ) -> Tensor:
        found = (str(like.dtype), [*like.shape]) if isinstance(like, Tensor) else None
        if found != (dtype, shape):
            has = f"it has a {found[0]} of shape {found[1]}" if found else "it has none"
            raise OtherTrainingError(
                f"A checkpoint has a {dtype} of shape {shape}, spread over ranks, and where it "
                f"belongs in the training {has}. Go on with the training that wrote it; of "
                "`Checkpoints.load` give a state as `like`."
            )
        return self.sharded.setdefault(str(place), make_room(like, layout))

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
