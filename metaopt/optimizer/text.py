"""Values in a few characters, for printing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from metaopt.transforms import is_readable

FEW = 4  # entries of a tensor, or values by names, that are printed one by one


def shorten(value: Any) -> str:
    """Return a value in a few characters.

    Of a tensor these are its entries, or their range, where they can be looked at.
    """
    if isinstance(value, tuple | list):
        return f"({', '.join(map(shorten, value))}{',' * (len(value) == 1)})"
    if isinstance(value, nn.Module):
        return type(value).__name__
    if not isinstance(value, Tensor):
        return repr(value)
    kind = "Parameter" if isinstance(value, nn.Parameter) else "tensor"
    if not is_readable(value) or value.is_complex():
        return f"{kind}(shape={tuple(value.shape)})"
    entries = value.detach()
    if entries.numel() <= FEW:
        return f"{kind}({_round(entries.tolist())})"
    low, high = float(entries.min()), float(entries.max())
    return f"{kind}(shape={tuple(entries.shape)}, {low:.4g} to {high:.4g})"


def _round(entries: Any) -> str:
    if isinstance(entries, list):
        return f"[{', '.join(map(_round, entries))}]"
    return f"{entries:.4g}" if isinstance(entries, float) else str(entries)
