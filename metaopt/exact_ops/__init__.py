"""Kernels whose derivatives are right at every order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from metaopt.exact_ops.attention import ATTENTION
from metaopt.exact_ops.dropout import DROPOUT
from metaopt.exact_ops.embedding import EMBEDDINGS, asks_for_sparse
from metaopt.exact_ops.losses import LOSSES
from metaopt.exact_ops.norms import NORMS
from metaopt.exact_ops.recurrent import RECURRENT
from metaopt.exact_ops.requires_grad import REQUIRES_GRAD
from metaopt.torch_internals import function_modes, has_forward_hooks
from metaopt.transforms import is_inside_jvp

__all__ = ["AnyOrder", "Watching", "any_order", "needs_care"]

# files of torch.nn.modules in which all is
CAREFUL = {"batchnorm", "dropout", "instancenorm", "normalization", "rnn", "transformer"}


def any_order() -> AbstractContextManager[Any]:
    """While entered, what torch computes can be differentiated any number of times.

    It may stand in any nesting of `grad` and `vmap`. All is computed from elementary operations
    then, or by kernels with derivatives of our own. Of attention the fused kernels have no second
    derivative; of layer, batch, instance and weight norms torch's formulas for higher derivatives
    are wrong; recurrent layers have no batching rule, and on some devices no second derivative.
    Gradients of `nn.Embedding(sparse=True)` are dense. Inside a transform `requires_grad_(True)`
    does nothing, where torch raises an error.

    Cost:
        About a microsecond for each call of a torch function, which Python then sees: 5 to 8 % of a
        meta-gradient's time for a 40-40 MLP. Batch and layer norm take as long as torch's in plain
        autograd; inside transforms of `torch.func` they are written out, which is a quarter of a
        second-order task of a convolution network. Entering it again inside costs nothing.
    """
    # The stack, not a flag of ours: torch takes a mode off it while it hands a function on, a
    # backward pass for example.
    entered = any(isinstance(mode, AnyOrder) for mode in function_modes())
    return nullcontext() if entered else AnyOrder()


def needs_care(model: nn.Module) -> bool:
    """Return True if a module in a model calls, or may call, what `any_order` computes instead."""
    return any(
        isinstance(module, nn.MultiheadAttention)
        or is_parametrized(module)
        or has_forward_hooks(module)
        or any(
            kind.__module__.removeprefix("torch.nn.modules.") in CAREFUL
            for kind in type(module).__mro__
        )
        for module in model.modules()
    )


class AnyOrder(TorchFunctionMode):
    """Computes what is in the tables by the functions there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


class Watching(AnyOrder):
    """Notes whether derivatives ask for anything to be computed otherwise than torch does it."""

    found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_dense = func in EMBEDDINGS and not asks_for_sparse(func, args, kwargs or {})
        # It lacks only forward derivatives, which are always taken with care.
        lacks_nothing = func in LOSSES and not is_inside_jvp()
        self.found = self.found or (func in _INSTEAD and not (is_dense or lacks_nothing))
        return super().__torch_function__(func, types, args, kwargs)


_INSTEAD: dict[Callable[..., Any], Callable[..., Any]] = (
    NORMS | ATTENTION | RECURRENT | LOSSES | DROPOUT | EMBEDDINGS | REQUIRES_GRAD
)
