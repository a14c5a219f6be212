"""What can be asked about a tensor inside `torch.func` transforms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metaopt import torch_internals
from metaopt.torch_internals import outside_transforms as outside_transforms


def is_tracked(tensor: Tensor) -> bool:
    """Return True if autograd differentiates through `tensor`.

    It may do so at the top level, or at any level of `torch.func.grad`.
    """
    # Each level of `torch.func.grad` has a wrapper with a `requires_grad` of its own.
    while not tensor.requires_grad:
        if not torch_internals.is_wrapped(tensor):
            return False
        tensor = torch_internals.unwrapped(tensor)
    return True


def constant(leaf: Any) -> Any:
    """Return the tensor without its graph; anything that is not a tensor as it is.

    To see that it has no graph is faster than `detach`.
    """
    if not isinstance(leaf, Tensor) or not (torch.compiler.is_compiling() or is_tracked(leaf)):
        return leaf
    return leaf.detach()


def unwrap(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside the wrappers of every level of `torch.func`.

    That of a `vmap` has all its rows.
    """
    while torch_internals.is_wrapped(tensor):
        tensor = torch_internals.unwrapped(tensor)
    return tensor


def find_overlapping(leaves: Sequence[Tensor]) -> set[int]:
    """Return the places of the tensors that have memory in common with another one."""
    found: set[int] = set()
    last, reach = -1, -1  # of those before, the one that goes furthest
    for (begin, end), place in sorted((_span(leaf), place) for place, leaf in enumerate(leaves)):
        if begin < reach and begin < end:
            found |= {last, place}
        if end > reach:
            last, reach = place, end
    return found


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return (first, end) of the addresses that a tensor's entries lie at."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    begin = tensor.data_ptr()
    return begin, begin + (reach + 1) * tensor.element_size() if tensor.numel() else begin


def find_memories(leaves: Iterable[Tensor]) -> set[int]:
    """Return where the memories begin in which plain tensors lie, whole or in part."""
    return {leaf.untyped_storage().data_ptr() for leaf in leaves if _has_memory(leaf)}


def part_from(memories: set[int], leaf: Any) -> Any:
    """Return a leaf, a copy of it if it is a tensor that lies in one of these memories."""
    plain = unwrap(leaf) if isinstance(leaf, Tensor) else leaf
    is_there = _has_memory(plain) and plain.untyped_storage().data_ptr() in memories
    return plain.clone() if is_there else leaf


def _has_memory(leaf: Any) -> bool:
    return type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided


def is_sharded(leaf: Any) -> bool:
    """Return True if the entries of a tensor are spread over processes, as of torch's `DTensor`."""
    return type(leaf) is not Tensor and hasattr(leaf, "full_tensor")


def gather_whole(tensor: Tensor) -> Tensor:
    """Return a tensor that is spread over processes with all of its entries, on each of them."""
    if type(tensor) is Tensor or torch.compiler.is_compiling() or not is_sharded(tensor):
        return tensor
    whole: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def take_local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, in the same memory."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def spread_like(tensor: Tensor, like: Any) -> Tensor:
    """Return a tensor spread over the processes as another one is; as it is if that is not."""
    if not is_sharded(like):
        return tensor
    own: Any = tensor
    if not is_sharded(tensor):  # each process has it whole
        own = type(like.detach()).from_local(tensor, like.device_mesh, run_check=False)
    spread: Tensor = own.redistribute(placements=like.placements)
    return spread


def count_entries(tensor: Tensor) -> int:
    """Return the number of entries, in all rows of a `vmap` together."""
    return unwrap(tensor).numel()


def is_differentiable(leaf: Any) -> bool:
    """Return True for a tensor of a kind that has derivatives."""
    return isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())


def tracking_levels(tensor: Tensor) -> set[int]:
    """Return the levels of `torch.func.grad` that differentiate through `tensor`.

    Plain autograd is level 0.
    """
    levels = set()
    while True:
        wrapped = torch_internals.is_wrapped(tensor)
        if tensor.requires_grad:
            levels.add(torch_internals.level_of(tensor) if wrapped else 0)
        if not wrapped:
            return levels
        tensor = torch_internals.unwrapped(tensor)


def values_are_readable() -> bool:
    """Return True if a tensor's value may decide what Python does next.

    It may not under vmap, grad, jvp or compile.
    """
    return not torch.compiler.is_compiling() and not torch_internals.is_in_transform()


def is_readable(tensor: Tensor) -> bool:
    """Return True if the entries of a tensor can be looked at.

    Those of other classes may be fake, or spread over processes.
    """
    return values_are_readable() and not tensor.is_meta and type(tensor) in (Tensor, nn.Parameter)


def is_unrecorded() -> bool:
    """Return True if nothing records derivatives.

    There is then no graph, no forward mode, no transform and no compiler.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch_internals.is_in_transform()
        and not torch_internals.uses_dual_numbers()
    )


def is_forward_only() -> bool:
    """Return True if nothing records derivatives; a batch of `vmap` may be under way.

    There is then no graph, no forward mode, no other transform and no compiler.
    """
    return (
        not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch_internals.uses_dual_numbers()
        and all(level.key() == torch_internals.VMAP for level in torch_internals.transforms())
    )


def is_inside_jvp() -> bool:
    """Return True if `torch.func.jvp` is active."""
    return any(level.key() == torch_internals.JVP for level in torch_internals.transforms())


def has_tangent(leaf: Any) -> bool:
    """Return True if forward mode differentiates through a tensor.

    It may be that of `torch.func.jvp`, or dual numbers.
    """
    if not torch_internals.uses_dual_numbers() or not is_differentiable(leaf):
        return False
    # A batched one cannot be asked.
    while torch_internals.is_batched(leaf) or forward_ad.unpack_dual(leaf).tangent is None:
        if not torch_internals.is_wrapped(leaf):
            return False
        leaf = torch_internals.unwrapped(leaf)
    return True


def unwrap_grad_levels(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside those of the levels of `torch.func.grad`.

    Raises:
        ValueError: there is a level of `vmap` among them.
    """
    while torch_internals.is_wrapped(tensor):
        if torch_internals.is_batched(tensor):
            raise ValueError(
                'A loop with Revolve(store="disk") cannot run under `vmap` (nor `jacrev`), which '
                "hides the values that are to be written. Go through the batch in a loop "
                '(`meta_grad(..., chunk_size=1)`), or use store="cpu".'
            )
        tensor = torch_internals.unwrapped(tensor)
    return tensor


def unwrap_ended(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor, or None, without the wrappers of `torch.func` levels that have ended.

    When `torch.func.vjp` has returned, its level is over, but what an `autograd.Function` saved
    there is still wrapped in it while the pullback runs. Operations see through that; a transform
    started inside `backward` fails ("escaped?").
    """
    return None if tensor is None else torch_internals.unwrapped_if_over(tensor)
