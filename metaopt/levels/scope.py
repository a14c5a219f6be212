"""What a loss sees of the levels, and the loss as a function of tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor

from metaopt._functional import Functional, Params
from metaopt.checks import describe
from metaopt.exact_ops import any_order
from metaopt.levels.level import Level
from metaopt.levels.loss_scale import enter_scaled, leave_scaled
from metaopt.transforms import constant
from metaopt.tree import Tree


class Shown(TypedDict):
    """The tensors of a level that others can read."""

    params: Params
    buffers: Params


Scene = dict[str, Shown]  # level -> its tensors at one moment
Rows = dict[str, Tree]  # level -> batches of it, with axes in front: see `Plan.leading_axes`


class After(TypedDict):
    """What a loss returns beside its value.

    Attributes:
        buffers: those of its model, afterwards.
        metrics: scalars to be logged.
    """

    buffers: Params
    metrics: dict[str, Tensor]


class LevelView:
    """A level inside a loss.

    `view(x)` calls its model with its present parameters, `view.params` and `view.buffers` are the
    tensors by name.
    """

    def __init__(self, net: Functional, params: Params, buffers: Params, keeps_statistics: bool):
        self._net, self._keeps_statistics = net, keeps_statistics
        self.params, self.buffers = params, buffers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the model's output."""
        if not self.buffers:
            return self._net._call(self.params, {}, args, kwargs)
        if self._keeps_statistics:
            output, self.buffers = self._net.with_buffers(
                self.params, self.buffers, *args, **kwargs
            )
            return output
        return self._net.frozen(self.params, self.buffers, *args, **kwargs)


class Levels:
    """What a level's loss gets: the levels by name, as attributes."""

    def __init__(self, reader: str, views: Mapping[str, LevelView], known: Collection[str]):
        self._reader, self._known = reader, known
        self.__dict__ |= views

    def __getattr__(self, name: str) -> LevelView:
        if name.startswith("_"):
            raise AttributeError(name)
        if name not in self._known:
            raise ValueError(
                f"level {self._reader!r}: its loss reads `levels.{name}`, but no edge leads to a "
                f"level of this name. The graph has {sorted(self._known)}."
            )
        raise ValueError(
            f"level {self._reader!r}: its loss reads `levels.{name}` now, but did not when the "
            f"graph was built. A loss must read the same levels every time."
        )


class NotingLevels(Levels):
    """`Levels` that records which names are read."""

    def __init__(
        self, reader: str, views: Mapping[str, LevelView], known: Collection[str], read: set[str]
    ):
        super().__init__(reader, {}, known)
        self._views, self._read = views, read

    def __getattr__(self, name: str) -> LevelView:
        if name not in self._views:
            return super().__getattr__(name)
        self._read.add(name)
        return self._views[name]


def evaluate(
    level: Level,
    nets: Mapping[str, Functional],
    scene: Scene,
    rows: Rows,
    *,
    reads: Collection[str] | None = None,
    keeps_statistics: bool = True,
    exact: bool = True,
    carried: Mapping[str, Collection[str]] | None = None,
    noted: set[str] | None = None,
) -> tuple[Tensor, After]:
    """Return the level's loss in a scene, and its `After`.

    Args:
        level: the level.
        nets: every level's model.
        scene: the tensors of the levels, its own among them.
        rows: the loss gets the batch of its level among these, None if there is none.
        reads: the levels that it may read; all by default.
        keeps_statistics: whether the level's own buffers are updated.
        exact: whether it needs care that derivatives of every order are right, see `any_order`.
        carried: level -> its buffers that have derivatives; all others are constants. None: all
            have.
        noted: gets the names of the levels that it reads.

    Raises:
        ValueError: the loss reads an unknown level, or returns no scalar.
    """
    seen = {name: scene[name] for name in (scene if reads is None else reads)}
    scale = level.loss_scale if level.precision is torch.float16 else 1.0
    if scale != 1:
        seen = enter_scaled(seen, scale)
    views = {
        name: LevelView(
            nets[name],
            shown["params"],
            keep_carried(shown["buffers"], name, carried),
            keeps_statistics and name == level.name,
        )
        for name, shown in seen.items()
    }
    if noted is None:
        levels = Levels(level.name, views, nets)
    else:
        levels = NotingLevels(level.name, views, nets, noted)
    batch = rows.get(level.name)
    if exact or level.precision is not None:
        autocast = (
            nullcontext()
            if level.precision is None
            else torch.autocast(level.device.type, dtype=level.precision)
        )
        with any_order() if exact else nullcontext(), autocast:
            result = level.loss(levels, batch)
    else:
        result = level.loss(levels, batch)
    loss, metrics = _split(level.name, result)
    buffers = keep_carried(views[level.name].buffers, level.name, carried)
    if scale != 1:
        loss, buffers = leave_scaled((loss, buffers), scale)
    return loss, {"buffers": buffers, "metrics": metrics}


def _split(level: str, result: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return (loss, metrics) of what a loss returned."""
    metrics: dict[str, Tensor] = {}
    if isinstance(result, Mapping):
        metrics = dict(sorted(result.items()))
        if "loss" not in metrics:
            raise ValueError(
                f'level {level!r}: a loss that returns a dict must have the key "loss", got '
                f"{sorted(metrics)}."
            )
        result = metrics.pop("loss")
    for name, value in (("loss", result), *metrics.items()):
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            raise ValueError(
                f"level {level!r}: the loss must return floating-point scalars, got for "
                f"{name!r} a {describe(value)}. Take the mean."
            )
    return result, {name: value.detach() for name, value in metrics.items()}


def keep_carried(
    buffers: Params, level: str, carried: Mapping[str, Collection[str]] | None
) -> Params:
    """Return a level's buffers, as constants apart from those that are carried.

    This is for buffers that come in, too: a step that is rebuilt, or a loop that is one Function,
    gives derivatives to all that floats, and torch's norm layers refuse running statistics that
    have one.
    """
    if not buffers or carried is None:
        return buffers
    names = carried.get(level, ())
    return {key: buffer if key in names else constant(buffer) for key, buffer in buffers.items()}
