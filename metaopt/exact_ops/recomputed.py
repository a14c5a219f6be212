"""A function that keeps its inputs alone for its derivatives, of every order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaopt.torch_internals import uses_dual_numbers
from metaopt.transforms import unwrap_ended, values_are_readable

Function = Callable[..., Tensor | tuple[Tensor, ...]]


def recomputed(function: Function, *tensors: Tensor) -> Any:
    """Return `function(*tensors)`; what it computes on the way is computed again for derivatives.

    Its pullback is such a function too, and so is the pullback of that: a derivative of any order
    keeps inputs and cotangents, and the intermediate results of one call at a time. It may stand in
    any nesting of `grad`, `vmap` and `jvp`.

    Args:
        function: of tensors alone; it draws no random numbers, and reads no other tensor that is
            differentiated. It may have its pullback written out: `function.pullback(wanted)` is a
            function of (tensors, cotangents of the results) which returns the cotangents of the
            tensors that are wanted. By default autograd finds them.
        tensors: its arguments; those that are no floating-point numbers have no derivative.

    Cost:
        One more evaluation a derivative.
    """
    return _Recomputed.apply(function, *tensors)  # type: ignore[no-untyped-call]


def pullback_of(function: Function, wanted: Sequence[bool]) -> Function:
    """Return the function of (tensors, cotangents) whose results are the wanted cotangents."""
    written = getattr(function, "pullback", None)
    return partial(_pull_back, function, wanted) if written is None else written(wanted)


class _Recomputed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(function: Function, *tensors: Tensor) -> Any:
        return function(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        tensors: list[Any] = [unwrap_ended(saved) for saved in ctx.saved_tensors]
        wanted = ctx.needs_input_grad[1:]
        bars = iter(recomputed(pullback_of(ctx.function, wanted), *tensors, *cotangents))
        return None, *(next(bars) if is_wanted else None for is_wanted in wanted)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Any:
        moves = tuple(tangent is not None for tangent in tangents)
        given = [tangent for tangent in tangents if tangent is not None]
        return recomputed(partial(_push_forward, ctx.function, moves), *ctx.saved_tensors, *given)


def _pull_back(
    function: Function, wanted: Sequence[bool], *arguments: Tensor
) -> tuple[Tensor, ...]:
    """Return the cotangents of the wanted tensors; `arguments` are (tensors, cotangents)."""
    tensors, cotangents = arguments[: len(wanted)], arguments[len(wanted) :]
    variables = [x for x, is_wanted in zip(tensors, wanted, strict=True) if is_wanted]
    if not values_are_readable() or uses_dual_numbers():
        result, pull = torch.func.vjp(  # type: ignore[misc]
            lambda *chosen: function(*_put(chosen, tensors, wanted)), *variables
        )
        return tuple(pull(cotangents if isinstance(result, tuple) else cotangents[0]))
    # Plain autograd frees what it has used; a transform keeps all for another derivative.
    again = torch.is_grad_enabled()
    fresh = [
        x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_()
        for x in variables
    ]
    with torch.enable_grad():
        result = function(*_put(fresh, tensors, wanted))
    return torch.autograd.grad(
        result, fresh, cotangents, create_graph=again, materialize_grads=True
    )


def _push_forward(function: Function, moves: tuple[bool, ...], *arguments: Tensor) -> Any:
    """Return the tangents of the result; `arguments` are (tensors, tangents of those that move)."""
    tensors, tangents = arguments[: len(moves)], arguments[len(moves) :]
    points = tuple(x for x, is_moving in zip(tensors, moves, strict=True) if is_moving)
    return torch.func.jvp(
        lambda *chosen: function(*_put(chosen, tensors, moves)), points, tangents
    )[1]


def _put(
    chosen: Iterable[Tensor], tensors: Sequence[Tensor], places: Sequence[bool]
) -> list[Tensor]:
    """Return the tensors with the chosen ones in these places."""
    fresh = iter(chosen)
    return [next(fresh) if here else x for x, here in zip(tensors, places, strict=True)]
