"""The limits that a module remembers of its numbers and tensors."""

from __future__ import annotations

from torch import Tensor, nn

from metaopt.checks import Limits


def note_limits(owner: nn.Module, name: str, limits: Limits) -> None:
    """Remember the limits of the attribute `name`, for `check_limits`."""
    owner.__dict__.setdefault("_limits", {})[name] = limits


def check_limits(module: nn.Module) -> None:
    """Raise ValueError if a number or tensor in a module is out of the limits it was given with."""
    for owner in module.modules():
        for name, limits in owner.__dict__.get("_limits", {}).items():
            if isinstance(value := getattr(owner, name), float | Tensor):
                limits.check(owner, name, value)
