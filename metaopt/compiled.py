"""Compilation of whole functions, where there is a compiler."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from metaopt import tree
from metaopt.torch_internals import load_compiler
from metaopt.transforms import constant

# Compiled versions of one function. Torch's limit of 8 is soon met by the step that all losses
# share.
VERSIONS = 64
# What the compiler behind torch fails with where none is installed, for the CPU or the GPU.
_MISSING = {"InvalidCxxCompiler", "TritonMissing"}


def compile_whole(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` compiled by `torch.compile` as one graph.

    It draws the random numbers that it would draw uncompiled. What is compiled is found again by
    the code of `fn` and what it closes over, so a new closure of the same code is no new
    compilation. Every new shape, dtype or structure is one.

    Raises:
        torch._dynamo.exc.Unsupported: something in `fn` cannot be part of one graph; torch says
            what and where.

    Warns:
        RuntimeWarning: once, if no compiler is installed; then `fn` runs as it is.
    """

    def version(**more: bool) -> Callable[..., Any]:
        options: dict[str, Any] = {
            "fallback_random": True,
            "guard_filter_fn": lambda guards: [_may_change(guard) for guard in guards],
            **more,
        }
        # The overloads of torch 2.13 lack `recompile_limit`.
        result: Callable[..., Any] = torch.compile(  # type: ignore[call-overload]
            fn, fullgraph=True, dynamic=False, recompile_limit=VERSIONS, options=options
        )
        return result

    general, native = version(), version(cpp_wrapper=True)

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _MISSING_FOUND:
            return fn(*args)
        # Parameters and what is computed from them then share one compiled version.
        if not torch.is_grad_enabled():
            args = tree.map(constant, args)
        load_compiler()
        try:
            return (native if _are_real_and_on_cpu(args) else general)(*args)
        except Exception as error:
            reason = getattr(error, "inner_exception", None)
            if type(reason).__name__ not in _MISSING:
                raise
            _MISSING_FOUND.append(str(reason).split("\n")[0])
        warnings.warn(
            f"`compile=True` has no effect, because torch found no compiler: {_MISSING_FOUND[0]}. "
            "Install one (Debian: apt install g++), or leave `compile` out.",
            RuntimeWarning,
            stacklevel=2,
        )
        return fn(*args)

    return call


def _are_real_and_on_cpu(args: Any) -> bool:
    """Return True if what calls the kernels is to be compiled too, into one C++ file with them.

    A meta-gradient of a small network took 0.88 of the time, and compiling it half, for there is
    one file in place of hundreds. Of complex numbers there are no kernels, and each operation would
    be looked up by its name. On GPUs it has not been measured.
    """
    return all(
        leaf.is_cpu and not leaf.is_complex()
        for leaf in tree.leaves(args)
        if isinstance(leaf, torch.Tensor)
    )


# Globals of torch and of this library, and those of the compiled function itself, which is this
# library's.
_LIBRARY = re.compile(
    r"G\['(?!__import_|___unnamed)|G\['__import_(torch|metaopt|contextlib|dataclasses)(_dot_|')"
)


def _may_change(guard: Any) -> bool:
    """Return True if this is to be looked at before each call.

    The code of libraries stays as it is, and is half of what could be checked.
    """
    return not (guard.is_global and _LIBRARY.match(guard.name))


_MISSING_FOUND: list[str] = []  # the reason, once it has been met: every attempt costs seconds
