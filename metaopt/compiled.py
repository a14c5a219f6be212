"""Compilation of whole functions, where there is a compiler."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from metaopt import tree
from metaopt.torch_internals import backend_failure, dynamo_config, load_compiler

# compiled versions of one function: torch's limit of 8 is soon met by the step that all losses
# share
ENTRIES = 64
# what torch raises without a compiler for the CPU or the GPU
_MISSING = {"InvalidCxxCompiler", "TritonMissing"}


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` compiled by `torch.compile` as one graph, drawing the random numbers that it
    would draw uncompiled.

    What is compiled is found again by the code of `fn` and what it closes over, so a new closure of
    the same code is no new compilation. Every new shape, dtype or structure is one.

    Raises:
        torch._dynamo.exc.Unsupported: something in `fn` cannot be part of one graph; torch says
            what and where.

    Warns:
        RuntimeWarning: once, if no compiler is installed; then `fn` runs as it is.
    """
    options: dict[str, Any] = {
        "fallback_random": True,
        "guard_filter_fn": lambda guards: [*map(_may_change, guards)],
    }
    general = torch.compile(fn, fullgraph=True, dynamic=False, options=options)
    native = torch.compile(
        fn, fullgraph=True, dynamic=False, options={**options, "cpp_wrapper": True}
    )

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _MISSING_FOUND:
            return fn(*args)
        # parameters and what is computed from them then share one compiled version
        if not torch.is_grad_enabled():
            args = tree.map(_constant, args)
        _load_compiler()
        config = dynamo_config()
        limit = config.recompile_limit
        try:
            config.recompile_limit = ENTRIES
            return (native if _are_real_and_on_cpu(args) else general)(*args)
        except backend_failure() as error:
            reason = getattr(error, "inner_exception", None)
            if type(reason).__name__ not in _MISSING:
                raise
            _MISSING_FOUND.append(str(reason).split("\n")[0])
        finally:
            config.recompile_limit = limit
        warnings.warn(
            f"`compile=True` has no effect, because torch found no compiler: {_MISSING_FOUND[0]}. "
            f"Install one (Debian: apt install "
            "g++), or leave `compile` out.",
            RuntimeWarning,
            stacklevel=2,
        )
        return fn(*args)

    return call


# `catch_warnings` takes time, and is not safe where threads run beside: once is enough
@functools.cache
def _load_compiler() -> None:
    """Let torch load its compiler, without the warning that it gives itself then: seen in 2.13 to
    2.15.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script(_method)?` is deprecated")
        load_compiler()


def _are_real_and_on_cpu(args: Any) -> bool:
    """Say whether what calls the kernels is to be compiled too, into one C++ file with them.

    A meta-gradient of a small network took .88 of the time, and compiling it half, for there is one
    file in place of hundreds. Of complex numbers there are no kernels, and each operation would be
    looked up by its name; for GPUs it has not been measured.
    """
    return all(
        leaf.is_cpu and not leaf.is_complex()
        for leaf in tree.leaves(args)
        if isinstance(leaf, torch.Tensor)
    )


def _constant(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf


# Globals of torch and of this library, and those of the compiled function itself, which is this
# library's.
_LIBRARY = re.compile(
    r"G\['(?!__import_|___unnamed)|G\['__import_(torch|metaopt|contextlib|dataclasses)(_dot_|')"
)


def _may_change(guard: Any) -> bool:
    """Say whether to look at this before each call: the code of libraries stays as it is, and is
    half of what could be checked.
    """
    return not (guard.is_global and _LIBRARY.match(guard.name))


_MISSING_FOUND: list[str] = []  # the reason, once it has been met: every attempt costs seconds
