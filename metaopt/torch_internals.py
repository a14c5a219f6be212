"""Every private name of torch that the library uses, with the reason: no other file may use one.

Each was seen to be there, and to do this, in torch 2.13, 2.14 and 2.15. `test_torch_internals`
checks them one by one, so a torch that changes one says so by that test's name.
"""

from __future__ import annotations

import copy
import functools
import importlib
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import _C, Tensor, nn
from torch._C import _autograd as _hooks
from torch._C import _functorch
from torch._C import _len_torch_function_stack as _has_function_mode
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters as transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_transforms
from torch.autograd import forward_ad
from torch.nn.modules import module as _module
from torch.nn.modules.batchnorm import _NormBase as NormWithStatistics
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils import _pytree as pytree

__all__ = [
    "COMPILED_CALL",
    "JVP",
    "VMAP",
    "NormWithStatistics",
    "allow_hooks",
    "allow_in_compiled_graphs",
    "buffers_of",
    "children_of",
    "foreach_add",
    "foreach_addcmul",
    "foreach_copy_",
    "foreach_mul",
    "foreach_norm",
    "foreach_sqrt",
    "function_modes",
    "fused_adam_",
    "fused_adamw_",
    "has_buffers",
    "has_forward_hooks",
    "has_no_hooks",
    "holders_of",
    "is_autograd_excluded",
    "is_batched",
    "is_in_backward",
    "is_in_transform",
    "is_wrapped",
    "level_of",
    "load_compiler",
    "mark_constant_when_compiled",
    "outside_transforms",
    "parameters_of",
    "pytree",
    "refuse_hooks",
    "run_backward",
    "transforms",
    "twin_of",
    "unwrapped",
    "unwrapped_if_over",
    "uses_dual_numbers",
    "version",
    "weight_norm",
]

Function = TypeVar("Function")
M = TypeVar("M", bound=nn.Module)

_are_plain = {Tensor, nn.Parameter}.issuperset
_ALLOWED: list[Any] = []  # functions marked by `allow_in_compiled_graphs`
_ENGINE: Any = torch.autograd.Variable._execution_engine

# pytree: trees of tensors, as torch.func itself takes them. Torch has no public module for them.

# NormWithStatistics: what the layers of batch and instance norm have in common, running statistics.
# They have no public class in common.

# What an operator over lists of tensors saves: one call for all of them. `torch.optim` is built on
# the same names.
foreach_add = torch._foreach_add
foreach_addcmul = torch._foreach_addcmul
foreach_copy_ = torch._foreach_copy_
foreach_mul = torch._foreach_mul
foreach_norm = torch._foreach_norm
foreach_sqrt = torch._foreach_sqrt

# A whole step of Adam and AdamW in one pass, in place: what `torch.optim` calls with `fused=True`.
fused_adam_ = torch._fused_adam_
fused_adamw_ = torch._fused_adamw_

# What `torch.nn.utils.parametrizations.weight_norm` calls: a function mode that stands in for it
# has to know it.
weight_norm = torch._weight_norm

# The attribute of a module that `module.compile()` sets: a call of what it was then.
COMPILED_CALL = "_compiled_call_impl"

# The kind of transform that `torch.func.jvp` is.
JVP, VMAP = _functorch.TransformType.Jvp, _functorch.TransformType.Vmap

# Of a tensor at a level of `torch.func`: is it one, is the level a `vmap`, which level, the tensor
# that the level holds, and the same if the level is over. torch.func has no public way to ask.
is_wrapped = _functorch.is_functorch_wrapped_tensor
is_batched = _functorch.is_batchedtensor
level_of = _functorch.maybe_get_level
unwrapped = _functorch.get_unwrapped
unwrapped_if_over = _functorch.unwrap_if_dead


def is_in_transform() -> bool:
    """Return True inside a transform of `torch.func`."""
    return _functorch.peek_interpreter_stack() is not None


def uses_dual_numbers() -> bool:
    """Return True inside forward-mode differentiation, of `torch.func.jvp` or by dual numbers."""
    return forward_ad._current_level >= 0


def is_in_backward() -> bool:
    """Return True inside a backward pass of autograd, also in what a Function computes there."""
    return _C._current_graph_task_id() != -1


def is_autograd_excluded() -> bool:
    """Return True if operations on plain tensors are not recorded, whatever they require.

    So it is in inference mode, and in the forward pass of an `autograd.Function` that a transform
    of `torch.func` calls there: torch says then that inference mode is off.
    """
    return _C._dispatch_tls_is_dispatch_key_excluded(_C.DispatchKey.AutogradOther)


def version(leaf: Any) -> int:
    """Return the number of times a tensor was written to in place; 0 where torch does not count.

    It does not in inference mode and in a compiler, nor for anything that is not a tensor.
    """
    if not isinstance(leaf, Tensor) or torch.compiler.is_compiling() or leaf.is_inference():
        return 0
    return leaf._version


def holders_of(
    module: nn.Module, places: Iterable[tuple[tuple[str, ...], str]]
) -> list[dict[str, Any]]:
    """Return the dictionaries of parameters, or else of buffers, which hold these tensors.

    A tensor that takes the place of a parameter must be written there: the attribute takes
    parameters only.

    Args:
        module: where paths begin.
        places: (names of the modules that lead to the tensor, its own name in the last of them);
            all at once, since this runs for every tensor of every call of a model.

    Raises:
        KeyError: there is no such module.
    """
    found = []
    for path, key in places:
        at: Any = module
        for name in path:
            at = at._modules[name]
        found.append(at._parameters if key in at._parameters else at._buffers)
    return found


def parameters_of(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary in which a module holds its own parameters; before it has one, none."""
    own: dict[str, Any] = vars(module).get("_parameters", {})
    return own


def buffers_of(module: nn.Module) -> dict[str, Any]:
    """Return the dictionary in which a module holds its own buffers."""
    return module._buffers


def has_buffers(module: nn.Module) -> bool:
    """Return True if a module or one in it has a buffer.

    `module.buffers()` has to keep account of what it has seen, and takes four times as long.
    """
    pending = [module]
    while pending:
        one = pending.pop()
        if one._buffers:
            return True
        pending += [part for part in one._modules.values() if part is not None]
    return False


def twin_of(module: M) -> M:
    """Return a module with the same parameters, buffers and children, but registers of its own.

    What is lent or assigned to the twin does not appear in the module.
    """
    twin = copy.copy(module)
    twin.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in vars(module).items()
    }
    return twin


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the modules that stand in a module, by name, repeated ones too."""
    return module._modules


def has_forward_hooks(module: nn.Module) -> bool:
    """Return True if something else runs where a module is called, by its own hooks or by all's."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or _module._global_forward_hooks
        or _module._global_forward_pre_hooks
    )


def run_backward(
    results: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    variables: Sequence[Tensor],
    *,
    keep: bool,
    again: bool,
) -> Sequence[Tensor | None]:
    """Return the cotangents of these variables, None where no result depends on one.

    `torch.autograd.grad(results, variables, cotangents, retain_graph=keep, create_graph=again,
    allow_unused=True)` without its looks at what it is given, which take a tenth of the gradient of
    a small network and up to 8 % of a step of a level graph. Where a function mode or a subclass of
    tensors would see the call, it is made as torch makes it.

    Args:
        results: some that require grad.
        cotangents: of their shapes.
        variables: without any, the engine would write to the leaves of the graph; here it is not
            called.
        keep: whether the graph of the results is needed again.
        again: whether the answer is differentiable.
    """
    if not variables:
        return []
    if _has_function_mode() or not _are_plain(map(type, results)):
        return torch.autograd.grad(
            results, variables, cotangents, retain_graph=keep, create_graph=again, allow_unused=True
        )
    found: Sequence[Tensor | None] = _ENGINE.run_backward(
        tuple(results),
        tuple(cotangents),
        keep,
        again,
        tuple(variables),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def has_no_hooks() -> bool:
    """Return True if hooks on saved tensors are neither set nor refused."""
    return (
        _hooks._saved_tensors_hooks_get_disabled_error_message() is None
        and _hooks._top_saved_tensors_default_hooks(True) is None
    )


def refuse_hooks(reason: str) -> None:
    """Make setting hooks on saved tensors an error with this text, until `allow_hooks`.

    `torch.autograd.graph.disable_saved_tensors_hooks` does the same, as a context manager that
    takes several times as long.
    """
    _hooks._saved_tensors_hooks_disable(reason)


def allow_hooks() -> None:
    """End `refuse_hooks`."""
    _hooks._saved_tensors_hooks_enable()


def mark_constant_when_compiled(fn: Function) -> Function:
    """Mark a function that a compiler calls and does not look into: its result is a constant.

    This is `torch.compiler.assume_constant_result` in all but time: to set one attribute, that one
    imports the compiler, which takes as long as torch itself and is of no use to those who never
    compile.
    """
    fn._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return fn


def allow_in_compiled_graphs(fn: Function) -> Function:
    """Mark a function that a compiler puts into its graph as one call, without a look inside.

    What it calls, such as an `autograd.Function`, has then the derivatives that it has uncompiled.
    It is `torch.compiler.allow_in_graph`, which would import the compiler, put off until somebody
    compiles.
    """
    _ALLOWED.append(fn)
    return fn


@functools.cache
def load_compiler() -> None:
    """Import the compiler behind `torch.compile`, which torch otherwise does at the first call.

    Torch warns then of a function of its own that is deprecated. Only once is that warning kept
    off: it takes time, and is not safe where threads run beside.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script(_method)?` is deprecated")
        importlib.import_module("torch._inductor.compile_fx")
    for fn in _ALLOWED:
        torch.compiler.allow_in_graph(fn)
