"""A level's own loss as a function of what it sees: of one batch, or the mean over several."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from metaopt._functional import Functional, Params
from metaopt.levels.level import Level
from metaopt.levels.reading import Reading
from metaopt.levels.scope import After, Rows, Scene, evaluate, keep_carried
from metaopt.scan import scan
from metaopt.transforms import constant

OwnLoss = Callable[[Scene, Rows], tuple[Tensor, After]]


def make_loss(
    level: Level,
    reading: Reading,
    nets: Mapping[str, Functional],
    carried: Mapping[str, Collection[str]],
    *,
    keeps_statistics: bool,
) -> OwnLoss:
    """Return (scene, rows) -> (the level's loss, `After`).

    Args:
        level: the level.
        reading: what its loss depends on.
        nets: every level's model.
        carried: level -> its buffers that have derivatives.
        keeps_statistics: whether the level's own buffers are updated.
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
    return loss if level.accumulate == 1 else partial(_accumulate, level, reading, carried, loss)


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
