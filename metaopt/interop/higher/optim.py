"""Differentiable counterparts of optimizers.

They are found here, and their options become tensors that can be learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from metaopt.interop.higher.counterparts import (
    COUNTERPARTS,
    DifferentiableAdadelta,
    DifferentiableAdagrad,
    DifferentiableAdam,
    DifferentiableAdamax,
    DifferentiableAdamW,
    DifferentiableASGD,
    DifferentiableNAdam,
    DifferentiableRAdam,
    DifferentiableRMSprop,
    DifferentiableRprop,
    DifferentiableSGD,
)
from metaopt.interop.higher.differentiable import (
    DifferentiableOptimizer,
    GradCallback,
    Grads,
    Override,
    one_each,
)
from metaopt.interop.higher.patch import PatchedModule
from metaopt.interop.higher.tensors import flatten, map_leaves

__all__ = [
    "DifferentiableASGD",
    "DifferentiableAdadelta",
    "DifferentiableAdagrad",
    "DifferentiableAdam",
    "DifferentiableAdamW",
    "DifferentiableAdamax",
    "DifferentiableNAdam",
    "DifferentiableOptimizer",
    "DifferentiableRAdam",
    "DifferentiableRMSprop",
    "DifferentiableRprop",
    "DifferentiableSGD",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "register_optim",
]

_counterparts: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = dict(COUNTERPARTS)


def register_optim(
    optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]
) -> None:
    """Register `diff_optim_type` as the differentiable counterpart of `optim_type`.

    It is taken for optimizers whose class is exactly this one.
    """
    _counterparts[optim_type] = diff_optim_type


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: PatchedModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    grad_callback: GradCallback | None = None,
) -> DifferentiableOptimizer:
    """Return the differentiable counterpart of a live optimizer.

    The arguments are those of `DifferentiableOptimizer`.

    Raises:
        ValueError: there is none for its class, or as for `DifferentiableOptimizer`.
    """
    kind = _counterpart(type(opt))
    return kind(opt, reference_params, fmodel, device, override, grad_callback, track_higher_grads)


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: dict[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: PatchedModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    grad_callback: GradCallback | None = None,
) -> DifferentiableOptimizer:
    """Return the differentiable counterpart of `opt_type(params, **opt_kwargs)`.

    It stands before its first step.

    Args:
        opt_type: a class of `torch.optim`, or one made known with `register_optim`.
        opt_kwargs: its options.
        params: tensors of the parameters' shapes, or groups of them as torch has; by default those
            of `fmodel`.
        fmodel: as for `DifferentiableOptimizer`; so are the arguments that follow.
        device: see there.
        override: see there.
        track_higher_grads: see there.
        grad_callback: see there.

    Raises:
        ValueError: there is no counterpart of the class, or neither `params` nor `fmodel`.
    """
    kind = _counterpart(opt_type)
    if params is None and fmodel is None:
        raise ValueError("`params` or `fmodel` is needed, for the shapes of the parameters.")
    like: list[Any] = list(params if params is not None else fmodel.parameters())  # type: ignore[union-attr]
    groups = [dict(item) if isinstance(item, dict) else {"params": item} for item in like]
    for group in groups:
        tensors = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        group["params"] = [torch.zeros_like(tensor, requires_grad=True) for tensor in tensors]
    dummies = [dummy for group in groups for dummy in group["params"]]
    opt = opt_type(groups if like and isinstance(like[0], dict) else dummies, **(opt_kwargs or {}))
    return kind(opt, dummies, fmodel, device, override, grad_callback, track_higher_grads)


def get_trainable_opt_params(
    opt: torch.optim.Optimizer, device: torch.device | str | None = None
) -> Override:
    """Return the numbers among an optimizer's options as tensors that require grad.

    They have the form of an override. Numbers inside pairs are taken too; flags are not, nor what
    holds anything else.
    """
    override: Override = defaultdict(list)
    for group in opt.param_groups:
        for name, value in group.items():
            if name != "params" and all(_is_number(leaf) for leaf in flatten(value)):
                override[name].append(
                    map_leaves(
                        lambda x: torch.tensor(float(x), device=device, requires_grad=True), value
                    )
                )
    return override


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Write the values of an override into a live optimizer's groups.

    They become numbers of the kind that stand there.

    Raises:
        ValueError: the override has another number of values than the optimizer has groups, or
            another structure.
    """
    for name, values in override.items():
        for group, value in zip(
            opt.param_groups, one_each(name, values, len(opt.param_groups)), strict=True
        ):
            group[name] = _written(name, value, group.get(name))


def _counterpart(opt_type: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if opt_type not in _counterparts:
        raise ValueError(
            "There is no differentiable counterpart of "
            f"{opt_type.__module__}.{opt_type.__qualname__}; there is one of "
            f"{sorted(known.__name__ for known in _counterparts)}. Write one and call "
            "`register_optim`."
        )
    return _counterparts[opt_type]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _written(name: str, new: Any, old: Any) -> Any:
    """Return the value of `new` in the form of `old`."""
    new = new.detach() if isinstance(new, Tensor) else new
    match old:
        case list() | tuple() if isinstance(new, list | tuple) and len(new) == len(old):
            return type(old)(_written(name, *pair) for pair in zip(new, old, strict=True))
        case Tensor() if isinstance(new, Tensor | float | int):
            return torch.as_tensor(new).to(old, copy=True)
        case bool() if _is_scalar(new):
            return bool(new)
        case int() if _is_scalar(new) and float(new).is_integer():
            return int(new)
        case int() | float() if _is_scalar(new):
            # also where an integer stands: torch's default weight decay is the integer 0
            return float(new)
    raise ValueError(
        f"The override of {name!r} must have the form of the optimizer's own value {old!r}, got "
        f"{new!r}."
    )


def _is_scalar(value: Any) -> bool:
    return isinstance(value, float | int) or (isinstance(value, Tensor) and value.numel() == 1)


# The names that programs take from `higher.optim` although they begin with an underscore: they
# write a differentiable optimizer of their own with them.

_GroupedGradsType = list[Grads]
_StateType = list[defaultdict[int, dict[str, Any]]]
_GradClosureType = Callable[[Tensor], Tensor]
_OverrideType = Override
_GradCallbackType = GradCallback
_opt_mapping = _counterparts


def _add(tensor: Tensor, a1: Any, a2: Any = None) -> Tensor:
    """Return tensor + a1, or tensor + a1 a2."""
    product: Tensor = a1 if a2 is None else a1 * a2
    return tensor + product


def _addcmul(tensor: Tensor, a1: Any, a2: Any, a3: Any = None) -> Tensor:
    """Return tensor + a1 a2, or tensor + a1 a2 a3."""
    product: Tensor = a1 * a2 if a3 is None else a1 * a2 * a3
    return tensor + product


def _addcdiv(tensor: Tensor, a1: Any, a2: Any, a3: Any = None) -> Tensor:
    """Return tensor + a1 / a2, or tensor + a1 (a2 / a3)."""
    quotient: Tensor = a1 / a2 if a3 is None else a1 * (a2 / a3)
    return tensor + quotient


def _get_mask_closure(mask: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the hook that sets a gradient, and the gradient of that, to 0 where `mask` is."""

    def closure(grad: Tensor) -> Tensor:
        grad = torch.where(mask, torch.zeros_like(grad), grad)
        _maybe_mask(grad, mask)
        return grad

    return closure


def _maybe_mask(tensor: Tensor, mask: Tensor) -> None:
    """Set the gradients of `tensor` to 0 where `mask` is, if it has any."""
    if tensor.requires_grad:
        tensor.register_hook(_get_mask_closure(mask))


def _recursive_apply(replacement: Any, target: Any) -> Any:
    """Return the replacement in the form of the target; a tensor is written into the target."""
    if isinstance(target, Tensor) and isinstance(replacement, Tensor):
        with torch.no_grad():
            return target.copy_(replacement)
    if (
        isinstance(target, list | tuple)
        and isinstance(replacement, list | tuple)
        and len(target) == len(replacement)
    ):
        return type(target)(
            _recursive_apply(*pair) for pair in zip(replacement, target, strict=True)
        )
    return _written("an option", replacement, target)
