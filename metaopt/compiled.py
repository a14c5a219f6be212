"""Compilation of whole functions, where there is a compiler."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

from metaopt import tree

ENTRIES = 64  # compiled versions of one function: torch's limit of 8 is soon met by the step that all losses share
_MISSING = {"InvalidCxxCompiler", "TritonMissing"}  # what torch raises without a compiler for the CPU or the GPU


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` compiled by `torch.compile` as one graph, drawing the random numbers that it would draw uncompiled.

    What is compiled is found again by the code of `fn` and what it closes over, so a new closure of the same code is no new
    compilation. Every new shape, dtype or structure is one.

    Raises:
        torch._dynamo.exc.Unsupported: something in `fn` cannot be part of one graph; torch says what and where.

    Warns:
        RuntimeWarning: once, if no compiler is installed; then `fn` runs as it is.
    """
    fast = torch.compile(fn, fullgraph=True, dynamic=False, options={"fallback_random": True})

    @functools.wraps(fn)
    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or _MISSING_FOUND:
            return fn(*args)
        if not torch.is_grad_enabled():  # parameters and what is computed from them then share one compiled version
            args = tree.map(lambda leaf: leaf.detach() if isinstance(leaf, torch.Tensor) else leaf, args)
        try:
            with torch._dynamo.config.patch(recompile_limit=ENTRIES):
                return fast(*args)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = getattr(error, "inner_exception", None)
            if type(reason).__name__ not in _MISSING:
                raise
            _MISSING_FOUND.append(str(reason).split("\n")[0])
        warnings.warn(
            f"`compile=True` has no effect, because torch found no compiler: {_MISSING_FOUND[0]}. Install one (Debian: apt install "
            "g++), or leave `compile` out.",
            RuntimeWarning,
            stacklevel=2,
        )
        return fn(*args)

    return call


_MISSING_FOUND: list[str] = []  # the reason, once it has been met: every attempt costs seconds
