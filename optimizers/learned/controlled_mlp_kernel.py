"""The step of `ControlledMLP` in one pass of C++, for runs that nobody differentiates."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metaopt.native import load_native
from metaopt.optimizer import Slots
from metaopt.torch_internals import is_wrapped
from metaopt.transforms import is_forward_only, unwrap

SOURCE = Path(__file__).with_suffix("").with_name("controlled_mlp.cpp")
MEMORY = ("momenta", "square", "rows", "columns", "losses")


def is_usable(*tensors: Tensor) -> bool:
    """Return True if the kernel may compute with these tensors."""
    return (
        is_forward_only()
        and all(_is_plain(unwrap(tensor)) for tensor in tensors)
        and load_native(SOURCE) is not None
    )


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and type(tensor) in (Tensor, nn.Parameter)
    )


def step(
    sizes: Sequence[tuple[int, int, int]],
    orthogonal: bool,
    steps: float,
    theta: Tensor,
    grad: Tensor,
    param: Tensor,
    slots: Slots,
    scalars: Tensor,
) -> tuple[Tensor, Slots]:
    """Return (update, next memory).

    Args:
        sizes: (rows, columns, has one axis at most) of each tensor.
        orthogonal: whether the directions of matrices are made orthogonal.
        steps: T.
        theta: all weights, [289].
        grad: the gradients of all tensors, one behind the other, [n].
        param: the parameters, likewise.
        slots: the memory.
        scalars: (loss, step from 0, rate).
    """
    arrays = [theta, grad, param, *(slots[name] for name in MEMORY), scalars]
    # the operator is for vmap: called directly, the function saves the dispatcher's time
    run = _step if any(map(is_wrapped, arrays)) else _compute
    update, *after = run([x[None] for x in arrays], _number(tuple(sizes)), orthogonal, steps)
    return update[0], {name: x[0] for name, x in zip(MEMORY, after, strict=True)}


# The shapes of models by number: an operator takes a number, and under vmap each of its arguments
# costs time.
_layouts: list[ctypes.Array[c_int64]] = []


@functools.cache
def _number(sizes: tuple[tuple[int, int, int], ...]) -> int:
    numbers = [number for size in sizes for number in size]
    _layouts.append((c_int64 * len(numbers))(*numbers))
    return len(_layouts) - 1


def _compute(arrays: list[Tensor], layout: int, orthogonal: bool, steps: float) -> list[Tensor]:
    """Return [update, *next memory]; all arrays have a leading axis, the batch."""
    library = load_native(SOURCE)
    assert library is not None  # `is_usable` has asked
    arrays = [x.contiguous() for x in arrays]
    _, grad, _, *memory, _ = arrays
    written = [torch.empty_like(x) for x in (grad, *memory)]
    (batch, count), rows, columns = grad.shape, memory[2].shape[1], memory[3].shape[1]
    shapes = _layouts[layout]
    library.controlled_step(
        c_int64(batch),
        c_int64(len(shapes) // 3),
        shapes,
        c_int64(orthogonal),
        c_double(steps),
        *map(c_int64, (count, rows, columns)),
        *(c_void_p(x.data_ptr()) for x in (*arrays, *written)),
    )
    return written


_step = torch.library.custom_op("metaopt::controlled_step", _compute, mutates_args=())


@_step.register_vmap
def _batched(
    info: Any, in_dims: Any, arrays: list[Tensor], layout: int, orthogonal: bool, steps: float
) -> tuple[list[Tensor], list[int]]:
    """Join the axis that vmap adds with the batch."""
    size: int = info.batch_size
    moved = [
        x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(arrays, in_dims[0], strict=True)
    ]
    written = _step([x.reshape(-1, *x.shape[2:]) for x in moved], layout, orthogonal, steps)
    batch = moved[0].shape[1]
    return [x.view(size, batch, *x.shape[1:]) for x in written], [0] * len(written)
