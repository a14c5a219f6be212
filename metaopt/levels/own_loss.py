"""A level's own loss as a function of what it sees.

It is that of one batch, or the mean over several; and over the ranks, each with a part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Functional, Params
from metaopt.distributed import Ranks, copy_beside_backward, copy_to_ranks, sum_over_ranks
from metaopt.levels.level import Level
from metaopt.levels.reading import Reading
from metaopt.levels.scope import After, Rows, Scene, evaluate, keep_carried
from metaopt.scan import scan
from metaopt.transforms import constant, is_differentiable, is_sharded
from metaopt.tree import Tree

OwnLoss = Callable[[Scene, Rows], tuple[Tensor, After]]


def make_loss(
    level: Level,
    reading: Reading,
    nets: Mapping[str, Functional],
    carried: Mapping[str, Collection[str]],
    *,
    keeps_statistics: bool,
    ranks: Ranks,
) -> OwnLoss:
    """Return (scene, rows) -> (the level's loss, `After`).

    Args:
        level: the level.
        reading: what its loss depends on.
        nets: every level's model.
        carried: level -> its buffers that have derivatives.
        keeps_statistics: whether the level's own buffers are updated.
        ranks: which share the batches.
    """
    # Bound arguments, not calls around calls: a user's traceback has fewer frames of ours in it.
    loss = partial(
        evaluate,
        level,
        nets,
        reads=(level.name, *sorted(reading.levels)),
        keeps_statistics=keeps_statistics,
        exact=reading.is_delicate,
        carried=carried,
    )
    if level.accumulate > 1:
        loss = partial(_accumulate, level, reading, carried, loss)
    if ranks.are_many and level.batches is not None:
        loss = partial(_share, level, reading, ranks, loss)
    return loss


def _share(
    level: Level, reading: Reading, ranks: Ranks, loss: OwnLoss, scene: Scene, rows: Rows
) -> tuple[Tensor, After]:
    """Return the mean of a loss over the ranks, each with its part of the batch.

    L(w) = sum_r n_r / n L_r(w), where rank r has n_r of n examples: for a loss that is a mean over
    examples the same as of the whole batch. Everything around it, the rules too, takes it for a
    loss like any other; see `all_reduce` for its derivatives.
    """
    if any(is_sharded(leaf) for leaf in tree.leaves(rows[level.name])):
        return loss(scene, rows)  # a batch that is spread over the ranks is one for all of them
    own, share = _split_batch(level, rows[level.name], ranks)
    moves = frozenset().union(reading.params, *reading.moves.values())
    shown: Scene = {}
    for other in (level.name, *sorted(reading.levels)):
        # Zeros would arrive at what the loss does not depend on: a derivative that is to be missed.
        params = {
            key: leaf if level.allow_unused or (other, key) in moves else constant(leaf)
            for key, leaf in scene[other]["params"].items()
        }
        shown[other] = {"params": params, "buffers": scene[other]["buffers"]}
    seen = copy_beside_backward(shown)
    if seen is None:  # one message for each level: not all of them may be differentiated
        seen = {other: copy_to_ranks(one, ranks) for other, one in shown.items()}
    value, after = loss({**scene, **seen}, {level.name: own})
    # Buffers that count are alike anyway.
    counts = {k: leaf for k, leaf in after["buffers"].items() if not is_differentiable(leaf)}
    floats = {k: leaf for k, leaf in after["buffers"].items() if k not in counts}
    parts = tree.map(lambda leaf: share * leaf, (value, floats, after["metrics"]))
    total, floats, metrics = sum_over_ranks(parts, ranks)
    moved = counts | floats
    return total, {"buffers": {key: moved[key] for key in after["buffers"]}, "metrics": metrics}


def _split_batch(level: Level, batch: Tree, ranks: Ranks) -> tuple[Tree, float]:
    """Return (this rank's examples of a batch, their share of all)."""
    axis = 1 if level.accumulate > 1 else 0
    lengths = {leaf.shape[axis] for leaf in tree.leaves(batch) if leaf.ndim > axis}
    if len(lengths) != 1:
        shapes = [tuple(leaf.shape) for leaf in tree.leaves(batch)]
        raise ValueError(
            f"level {level.name!r}: {ranks.size} ranks share its batches, whose tensors must have "
            f"the number of examples as their leading axis, got the shapes {shapes}."
        )
    (count,) = lengths
    part = ranks.share(count, f"examples in a batch of the level {level.name!r}")
    at = (slice(None),) * axis + (part,)
    own = tree.map(lambda leaf: leaf[at] if leaf.ndim > axis else leaf, batch)
    return own, (part.stop - part.start) / count


def _accumulate(
    level: Level,
    reading: Reading,
    carried: Mapping[str, Collection[str]],
    loss: OwnLoss,
    scene: Scene,
    rows: Rows,
) -> tuple[Tensor, After]:
    """Return the mean of a loss over several batches, of one graph at a time."""
    name = level.name
    # what it reads, and no more: the scan differentiates in all that it is given
    scene = {other: scene[other] for other in (name, *sorted(reading.levels))}
    if not level.allow_unused:
        # A scan answers zero, not None, where there is no dependence: one that is to be missed.
        own = {
            key: leaf if (name, key) in reading.params else constant(leaf)
            for key, leaf in scene[name]["params"].items()
        }
        scene[name] = {"params": own, "buffers": scene[name]["buffers"]}
    kinds: list[torch.dtype] = []

    def step(scene: Scene, buffers: Params, batch: Any) -> tuple[Params, Tensor]:
        now: Scene = {**scene, name: {"params": scene[name]["params"], "buffers": buffers}}
        value, after = loss(now, {name: batch} if name in rows else {})
        values = [value, *after["metrics"].values()]
        kinds[:] = [value.dtype for value in values]
        wide = reduce(torch.promote_types, kinds)
        return after["buffers"], torch.stack([value.to(wide) for value in values])

    # its buffers go on from batch to batch, so they are the carry
    start = scene[name]["buffers"]
    # "steps": the graph of one batch at a time
    buffers, values = scan(step, scene, start, rows.get(name, ()), level.accumulate, "steps")
    mean, *others = [mean.to(kind) for mean, kind in zip(values.mean(0), kinds, strict=True)]
    return mean, {
        "buffers": keep_carried(buffers, name, carried),
        "metrics": dict(zip(reading.metrics, others, strict=True)),
    }
