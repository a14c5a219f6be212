"""Work shared over processes, and the derivatives of what they exchange."""

from metaopt.distributed.agreement import check_agreement
from metaopt.distributed.all_reduce import (
    copy_beside_backward,
    copy_to_ranks,
    gather_rows,
    mean_over_ranks,
    sum_over_ranks,
)
from metaopt.distributed.fully_sharded import call_fully_sharded, is_fully_sharded
from metaopt.distributed.noise import own_noise
from metaopt.distributed.overlap import OverlappedSums
from metaopt.distributed.ranks import Ranks, current_ranks, is_shared, join_ranks, work_alone

__all__ = [
    "OverlappedSums",
    "Ranks",
    "call_fully_sharded",
    "check_agreement",
    "copy_beside_backward",
    "copy_to_ranks",
    "current_ranks",
    "gather_rows",
    "is_fully_sharded",
    "is_shared",
    "join_ranks",
    "mean_over_ranks",
    "own_noise",
    "sum_over_ranks",
    "work_alone",
]
