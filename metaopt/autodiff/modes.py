"""Training mode or not: what models were in when a loop ran, they are in on its way back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import nn

Modes = Mapping[nn.Module, bool]  # module -> its `training`

_NOTED: ContextVar[dict[nn.Module, bool] | None] = ContextVar("modes", default=None)


def note_modes(model: nn.Module) -> None:
    """Note the modes of a model that runs, if somebody asks for them."""
    noted = _NOTED.get()
    if noted is not None and model not in noted:
        noted |= {module: module.training for module in model.modules()}


def noting_modes() -> AbstractContextManager[dict[nn.Module, bool]]:
    """While entered, note the modes of all models that run: those at their first call.

    Not in a compiler, which cannot trace that, and compiles for one mode.
    """
    return nullcontext({}) if torch.compiler.is_compiling() else _noting()


@contextmanager
def _noting() -> Iterator[dict[nn.Module, bool]]:
    noted: dict[nn.Module, bool] = {}
    token = _NOTED.set(noted)
    try:
        yield noted
    finally:
        _NOTED.reset(token)
        around = _NOTED.get()
        if around is not None:
            around |= {module: mode for module, mode in noted.items() if module not in around}


@contextmanager
def in_modes(modes: Modes) -> Iterator[None]:
    """While entered, the modules are in these modes; afterwards in their own."""
    others = [module for module, mode in modes.items() if module.training != mode]
    for module in others:
        module.training = not module.training
    try:
        yield
    finally:
        for module in others:
            module.training = not module.training
