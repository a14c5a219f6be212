"""What ranks draw at random from the generators that every program has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from metaopt.distributed.ranks import Ranks
from metaopt.random_state import kept_random_state


@contextmanager
def own_noise(ranks: Ranks) -> Iterator[None]:
    """While entered, each rank draws other numbers: dropout of its own part of a batch.

    Afterwards torch's generators have moved alike on all ranks, whatever each has drawn: the order
    of a shuffled `DataLoader` stays the same on all of them.
    """
    if not ranks.are_many:
        yield
        return
    seed = int(torch.randint(2**62, ())) + ranks.rank
    with kept_random_state():
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        yield
