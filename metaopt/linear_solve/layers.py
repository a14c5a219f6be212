"""Which parameters are weights of layers, and what those layers read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Layer(NamedTuple):
    """A linear map s = W a + b.

    Attributes:
        kind: "linear", "conv2d" or "embedding".
        weight: place of W among the parameters, None if it is not among them.
        bias: place of b, None if there is none or it is not among them.
    """

    kind: str
    weight: int | None
    bias: int | None

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Return [W b] as a matrix, of the parameters that are there."""
        columns = []
        if self.weight is not None:
            weight = parts[self.weight]
            columns.append(weight.T if self.kind == "embedding" else weight.flatten(1))
        if self.bias is not None:
            columns.append(parts[self.bias][:, None])
        return torch.cat(columns, 1)

    def split(self, matrix: Tensor, parts: list[Tensor]) -> None:
        """Put the parts of [W b] where they belong; the inverse of `join`."""
        if self.bias is not None:
            parts[self.bias] = matrix[:, -1]
        if self.weight is not None:
            own = matrix[:, :-1] if self.bias is not None else matrix
            shape = parts[self.weight].shape
            parts[self.weight] = own.T if self.kind == "embedding" else own.reshape(shape)


class Use(NamedTuple):
    """One call of a layer.

    Attributes:
        layer: which.
        kept: what was made of the rows that it read.
        slopes: the gradient by what it returned, [n, rows, outputs].
    """

    layer: Layer
    kept: Any
    slopes: Tensor


class Recording(TorchFunctionMode):
    """Notes the calls of layers whose weight or bias is among some tensors.

    What a layer returns gets zeros added, its probe: the gradient by them is that by the output,
    even if the output is changed in place later.

    Args:
        leaves: name -> tensor.
        read: called with a layer and the rows [n, rows, inputs] that it reads, with a last column
            of ones for a bias; what it returns is kept.

    Attributes:
        probes: of the calls, in order.
    """

    def __init__(self, leaves: dict[str, Tensor], read: Callable[[Layer, Tensor], Any]):
        super().__init__()
        self.names = [*leaves]
        self.places = {id(leaf): place for place, leaf in enumerate(leaves.values())}
        self.read = read
        self.probes: list[Tensor] = []
        self._calls: list[tuple[Layer, Any]] = []
        self._roles: dict[int, Layer | None] = {}  # None for what no layer does

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        call = _CALLS[func](*args, **kwargs) if func in _CALLS else None
        layer = None if call is None else self._find(call)
        if _is_recorded(output):
            for leaf in (*args, *kwargs.values()):
                self._note(self.places.get(id(leaf)), layer)
        if call is None or layer is None:
            return output
        with torch.no_grad():
            rows = _widen(call.rows())
            ones = torch.ones_like(rows[..., :1])
            columns = [rows] * (layer.weight is not None) + [ones] * (layer.bias is not None)
            self._calls.append((layer, self.read(layer, torch.cat(columns, -1))))
        self.probes.append(torch.zeros_like(output, requires_grad=True))
        return output + self.probes[-1]

    def _find(self, call: _Call) -> Layer | None:
        weight, bias = self.places.get(id(call.weight)), self.places.get(id(call.bias))
        return None if weight is None and bias is None else Layer(call.kind, weight, bias)

    def _note(self, place: int | None, layer: Layer | None) -> None:
        """Remember what a parameter is used as; it must be one thing."""
        if place is None:
            return
        role = layer if layer is not None and place in (layer.weight, layer.bias) else None
        if self._roles.setdefault(place, role) != role:
            kinds = sorted(
                {"something else" if r is None else r.kind for r in (role, self._roles[place])}
            )
            raise ValueError(
                f"KroneckerFactors: each parameter must have one use, got {self.names[place]!r}, "
                f"used as {' and as '.join(kinds)}, or with another weight or bias beside it. No "
                "Kronecker product stands for both. Give each use a weight of its own, or freeze "
                "it."
            )

    def others(self) -> list[int]:
        """Return the places of the parameters that no layer has."""
        return [place for place in range(len(self.names)) if self._roles.get(place) is None]

    def uses(self, slopes: Sequence[Tensor]) -> list[Use]:
        """Return the calls with gradients by the probes."""
        pairs = zip(self._calls, slopes, strict=True)
        return [
            Use(layer, kept, _widen(_OUTPUTS[layer.kind](slope))) for (layer, kept), slope in pairs
        ]


class _Call(NamedTuple):
    """The arguments of a layer: its weight and bias, and the rows [n, rows, inputs] it reads."""

    kind: str
    weight: Tensor
    bias: Tensor | None
    rows: Callable[[], Tensor]


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> _Call:
    return _Call("linear", weight, bias, lambda: _as_rows(input))


def _embedding(input: Tensor, weight: Tensor, *_: Any, **__: Any) -> _Call:
    return _Call(
        "embedding", weight, None, lambda: _as_rows(F.one_hot(input, len(weight)).to(weight.dtype))
    )


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Call | None:
    if groups != 1 or isinstance(padding, str) or input.ndim != 4:
        return None

    def rows() -> Tensor:
        return F.unfold(input, weight.shape[2:], dilation, padding, stride).transpose(1, 2)

    return _Call("conv2d", weight, bias, rows)


def _widen(x: Tensor) -> Tensor:
    """Return x in single precision at least, as eigenvectors need it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _as_rows(x: Tensor) -> Tensor:
    """Return [n, ..., d] as [n, rows, d]; a single row as [1, 1, d]."""
    return x.reshape(len(x) if x.ndim > 1 else 1, -1, x.shape[-1])


_CALLS: dict[Any, Callable[..., _Call | None]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.conv2d: _conv2d,
}
_OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": _as_rows,
    "embedding": _as_rows,
    "conv2d": lambda x: x.flatten(2).transpose(1, 2),
}


def _is_recorded(output: Any) -> bool:
    """Return True if autograd differentiates through what a function returned."""
    outputs = output if isinstance(output, tuple | list) else [output]
    return any(isinstance(one, Tensor) and one.requires_grad for one in outputs)
