"""Every private name of torch that the library uses, with the reason: nothing else may use one.

Each was seen to be there, and to do this, in torch 2.13, 2.14 and 2.15; `test_torch_internals` checks
them one by one, so a torch that changes one says so by that test's name.
"""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import DisableTorchFunction as DisableTorchFunction
from torch._C import _autograd as _hooks
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters as transforms
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as outside_transforms
from torch.autograd import forward_ad
from torch.nn.modules import module as _modules
from torch.overrides import _get_current_function_mode_stack as function_modes
from torch.utils import _pytree as pytree

__all__ = [
    "JVP",
    "DisableTorchFunction",
    "allow_hooks",
    "backend_failure",
    "dynamo_config",
    "foreach_add",
    "foreach_addcmul",
    "foreach_copy_",
    "foreach_mul",
    "foreach_norm",
    "foreach_sqrt",
    "function_modes",
    "has_forward_hooks",
    "has_no_hooks",
    "is_batched",
    "is_in_transform",
    "is_wrapped",
    "level_of",
    "load_compiler",
    "mark_constant_when_compiled",
    "outside_transforms",
    "pytree",
    "refuse_hooks",
    "transforms",
    "unwrapped",
    "unwrapped_if_over",
    "uses_dual_numbers",
    "version",
    "weight_norm",
]

Function = TypeVar("Function")

# DisableTorchFunction: while entered, no torch function mode sees what runs. Under a mode every look
# at a shape or a dtype is a Python call of its own. There is no public name for it.

# pytree: trees of tensors, as torch.func itself takes them. Its public name, `torch.utils.pytree`,
# does not give paths to leaves.

# What an operator over lists of tensors saves: one call for all of them. `torch.optim` is built on
# these names, which have been the same since torch 1.9.
foreach_add = torch._foreach_add
foreach_addcmul = torch._foreach_addcmul
foreach_copy_ = torch._foreach_copy_
foreach_mul = torch._foreach_mul
foreach_norm = torch._foreach_norm
foreach_sqrt = torch._foreach_sqrt

# What `torch.nn.utils.parametrizations.weight_norm` calls: a function mode that stands in for it has
# to know it.
weight_norm = torch._weight_norm

# The kind of transform that `torch.func.jvp` is.
JVP = _functorch.TransformType.Jvp

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


def version(leaf: Any) -> int:
    """Return how often a tensor was written to in place; 0 where torch does not count it.

    So it is in inference mode and in a compiler, and for anything that is not a tensor.
    """
    if not isinstance(leaf, Tensor) or torch.compiler.is_compiling() or leaf.is_inference():
        return 0
    return leaf._version


def has_no_hooks() -> bool:
    """Return True if hooks on saved tensors are neither set nor refused."""
    return (
        _hooks._saved_tensors_hooks_get_disabled_error_message() is None
        and _hooks._top_saved_tensors_default_hooks(True) is None
    )


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Return True if calling the module calls hooks too: its own, or those of all modules."""
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or _modules._global_forward_hooks or _modules._global_forward_pre_hooks)


def refuse_hooks(reason: str) -> None:
    """Let whoever sets hooks on saved tensors get an error with this text, until `allow_hooks`.

    `torch.autograd.graph.disable_saved_tensors_hooks` does the same, as a context manager that
    takes three times as long.
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


def load_compiler() -> None:
    """Import the compiler behind `torch.compile`, which torch otherwise does at the first call."""
    importlib.import_module("torch._inductor.compile_fx")


def dynamo_config() -> Any:
    """Return the settings of the compiler's front end, which is imported for it."""
    return torch._dynamo.config


def backend_failure() -> type[Exception]:
    """Return the error that `torch.compile` raises when the compiler behind it fails."""
    return torch._dynamo.exc.BackendCompilerFailed
