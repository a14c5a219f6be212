"""Seeing whether a step that was made again is the step that was taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from metaopt.transforms import gather_whole, is_differentiable, outside_transforms, unwrap


def check_rebuilt(rebuilt: Mapping[int, Tensor], taken: Sequence[Tensor | None]) -> None:
    """Raise if a rebuilt step was another one than the step that was taken.

    At the end of the way back, where one look at the device is enough for all of them. Rounding may
    differ: a rebuilt step is computed with a graph.

    Args:
        rebuilt: time -> the loss of that step, made again.
        taken: the loss of each step; None where it was not saved.

    Raises:
        ValueError: two losses differ by more than rounding.
    """
    times, found, before = list[int](), list[Tensor](), list[Tensor]()
    for t, value in sorted(rebuilt.items()):
        again, first = unwrap(value), taken[t]
        first = again if first is None else unwrap(first)
        if is_differentiable(again) and again.shape == first.shape:
            times += [t] * again.numel()  # a `vmap` has a loss for each of its rows
            found.append(again.detach().reshape(-1))
            before.append(first.detach().reshape(-1))
    if not times or found[0].is_meta:
        return
    with outside_transforms(), torch.no_grad():
        _compare(times, gather_whole(torch.cat(found)), gather_whole(torch.cat(before)))


def _compare(times: list[int], found: Tensor, taken: Tensor) -> None:
    """Raise if an entry differs by more than rounding; each has its time."""
    size = taken.abs().nan_to_num(posinf=0)
    room = torch.finfo(taken.dtype).eps ** 0.5 * size.clamp(min=1e-3 * size.max())
    is_same = ((found - taken).abs() <= room) | (found == taken) | (found.isnan() & taken.isnan())
    others = (~is_same).nonzero().reshape(-1).tolist()
    if others:
        first = others[0]
        raise ValueError(
            "A step that is made again on the way back must be the step that was taken, but the "
            f"loss of step {times[first]} was {taken[first].tolist():.6g} and is now "
            f"{found[first].tolist():.6g}. Only torch's global generators are wound back: does the "
            "loss draw from `random` or numpy, does it count its calls, was a model switched "
            "between train() and eval() meanwhile? Draw with torch, pass the numbers in `batches`, "
            'or use memory="full".'
        )
