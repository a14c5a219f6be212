"""What ends a training: on one rank, and so on all; and what is said then."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from metaopt.distributed import Ranks, gather_rows
from metaopt.train.checkpoint import Checkpoints


def find_reasons(reasons: Mapping[str, bool], ranks: Ranks) -> list[str]:
    """Return those that hold on any rank, in order.

    What happens to one rank, a signal or the end of its time, is for all of them: the others would
    wait for it in the next step.
    """
    holds = list(reasons.values())
    if ranks.are_many:
        holds = gather_rows(torch.tensor([holds]), ranks.size, ranks).any(0).tolist()
    return [name for name, one in zip(reasons, holds, strict=True) if one]


def tell_how_to_go_on(checkpoints: Checkpoints | None) -> str:
    """Return a sentence about what is saved, "" if nothing is."""
    if checkpoints is None:
        return ""
    return f" It is saved in {checkpoints.directory}. Run it again with `resume=True` to go on."
