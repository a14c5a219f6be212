"""Sums over ranks as flat messages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


@contextmanager
def _explained(message: Tensor) -> Iterator[None]:
    """Where a sum over ranks fails inside, say where to look."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"A sum over {dist.get_world_size()} ranks of {message.numel()} numbers failed on rank "
            f"{dist.get_rank()}: another rank has ended, or asks for something else. All ranks "
            "must make the same steps with the same models: look first at the error of the rank "
            f"that ended before the others. ({error})"
        ) from error


class Sending(NamedTuple):
    """A message on its way."""

    message: Tensor
    work: Any

    def wait(self) -> None:
        """Return when the sum stands in the message."""
        with _explained(self.message):
            self.work.wait()


def start_sum(message: Tensor) -> Sending:
    """Put the sum over ranks in the place of a message; it is there after `wait`."""
    with _explained(message):
        return Sending(message, dist.all_reduce(message, async_op=True))


# An operator, which a compiler calls and does not look into. What it does to other ranks cannot be
# seen in its result, so it must not be left out or called twice: no rank has a graph of its own.
@torch.library.custom_op("metaopt::sum_over_ranks", mutates_args=())
def _sum_message(message: Tensor) -> Tensor:
    total = message.clone(memory_format=torch.contiguous_format)
    with _explained(message):
        dist.all_reduce(total)
    return total


@_sum_message.register_fake
def _(message: Tensor) -> Tensor:
    return torch.empty_like(message, memory_format=torch.contiguous_format)


def sum_leaves(leaves: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum over ranks of each tensor; those of one dtype and device are one message."""
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for place, leaf in enumerate(leaves):
        kinds.setdefault((leaf.dtype, leaf.device), []).append(place)
    found = list(leaves)
    for places in kinds.values():
        some = [leaves[place] for place in places]
        total = _sum_message(torch.cat([leaf.reshape(-1) for leaf in some]))
        start = 0
        for place, leaf in zip(places, some, strict=True):
            found[place] = total.narrow(0, start, leaf.numel()).view(leaf.shape)
            start += leaf.numel()
    return found
