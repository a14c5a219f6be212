"""Modules whose parameters are spread over the ranks by `fully_shard`, called as functions.

Such a module gathers its own parameters where they are needed and sends each rank its part of the
gradient, by hooks that only a `backward()` calls, once. What asks for a derivative in another way,
or for a second one, gets a wrong answer and no error. Here a call of the module is one Function:
its own `backward()` runs inside, with the hooks, and it has one derivative.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function

from metaopt import tree
from metaopt.torch_internals import is_in_transform
from metaopt.transforms import take_local
from metaopt.tree import Tree


def is_fully_sharded(module: nn.Module) -> bool:
    """Return True if `fully_shard` was called on a module, or on one in it."""
    return bool(_find_sharded(module))


def _find_sharded(module: nn.Module) -> list[Any]:
    # who has not imported it has not called it; to import it takes a second
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [one for one in module.modules() if fsdp and isinstance(one, fsdp.FSDPModule)]


def _drop_gathered(module: nn.Module) -> None:
    for one in _find_sharded(module):
        one.reshard()


class _Called(NamedTuple):
    """What is called, apart from tensors that have derivatives.

    Attributes:
        module: by whom.
        names: of its parameters, which come first among the tensors.
        arguments: (args, kwargs), in which the other tensors stand.
    """

    module: nn.Module
    names: tuple[str, ...]
    arguments: Tree


def call_fully_sharded(
    module: nn.Module, params: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return the output of a module with other shards in place of its own.

    The cotangents of the parameters are sums over the ranks, each of which has its own input.

    Args:
        module: on which `fully_shard` was called.
        params: the shards, `DTensor`s like its own.
        args: its arguments.
        kwargs: its arguments by name.

    Raises:
        ValueError: inside a transform of `torch.func`; or in its second derivative.

    Cost:
        Two copies of this rank's shards.
    """
    if is_in_transform():
        raise ValueError(
            f"{type(module).__name__} is fully sharded, and cannot be called inside a transform of "
            "torch.func: its hooks are called by `backward()` only. Take a rule that looks at one "
            "point (`SAMA()`, `FiniteDifference()`, `Penalty()`), without `vmap` or `compile`."
        )
    called = _Called(module, tuple(params), (args, kwargs))
    return _Call.apply(called, *params.values(), *_find_inputs(called.arguments))  # type: ignore[no-untyped-call]


class _Call(Function):
    """(parameters, inputs) -> the output of a fully sharded module."""

    @staticmethod
    def forward(ctx: Any, called: _Called, *leaves: Tensor) -> Any:
        params, inputs = leaves[: len(called.names)], leaves[len(called.names) :]
        ctx.save_for_backward(*leaves)
        ctx.called, ctx.params = called, [leaf.detach() for leaf in params]
        ctx.inputs = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in inputs]
        arguments = _put_inputs(called.arguments, ctx.inputs)
        with _lent(called, ctx.params), torch.enable_grad():
            output = called.module(*arguments[0], **arguments[1])
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{type(called.module).__name__} is fully sharded, and must return one tensor, got "
                f"{type(output).__name__}. Compute the loss from it outside."
            )
        ctx.output = output
        return output.detach()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:
        called: _Called = ctx.called
        own = _find_own(called)
        before = [param.grad for param in own]
        for param in own:
            param.grad = None
        try:
            with _lent(called, ctx.params), torch.enable_grad():
                torch.autograd.backward(ctx.output, bar.detach())
            # its hooks send means over the ranks
            size = torch.distributed.get_world_size()
            found = [None if param.grad is None else size * param.grad for param in own]
        finally:
            for param, grad in zip(own, before, strict=True):
                param.grad = grad
        grads = [*found, *(leaf.grad for leaf in ctx.inputs)]
        ctx.output = ctx.inputs = None
        if torch.is_grad_enabled():
            depends_on = (bar, *ctx.saved_tensors)
            grads = [
                grad if grad is None else _Once.apply(grad, *depends_on)  # type: ignore[no-untyped-call]
                for grad in grads
            ]
        return None, *grads


class _Once(Function):
    """(x, all that it depends on) -> x, whose derivative is refused."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *depends_on: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Any:
        raise ValueError(
            "A fully sharded module has first derivatives only: what its hooks gather and send is "
            "not recorded. Take `SAMA()`, `FiniteDifference()` or `Penalty()`, or parameters that "
            "are `DTensor`s of a module without `fully_shard`, which have all derivatives."
        )


@contextmanager
def _lent(called: _Called, params: Sequence[Tensor]) -> Iterator[None]:
    """While entered, the module's shards have other values.

    Before and after, what it has gathered is dropped: the outermost module keeps that from its
    forward to its backward pass, and would use the values of another call.
    """
    _drop_gathered(called.module)
    own = [take_local(param).detach() for param in _find_own(called)]
    kept = [shard.clone() for shard in own]
    with torch.no_grad():
        for shard, other in zip(own, params, strict=True):
            shard.copy_(take_local(other))
    try:
        yield
    finally:
        _drop_gathered(called.module)
        with torch.no_grad():
            for shard, value in zip(own, kept, strict=True):
                shard.copy_(value)


def _find_own(called: _Called) -> list[nn.Parameter]:
    named = dict(called.module.named_parameters())
    return [named[name] for name in called.names]


def _find_inputs(arguments: Tree) -> list[Tensor]:
    return [leaf for leaf in tree.leaves(arguments) if _is_input(leaf)]


def _put_inputs(arguments: Tree, inputs: Sequence[Tensor]) -> Tree:
    each = iter(inputs)
    return tree.map(lambda leaf: next(each) if _is_input(leaf) else leaf, arguments)


def _is_input(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
