"""One level: a model, its loss, and the optimizer that minimises it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from metaopt._functional import functional
from metaopt.checks import check_count, check_flag, check_positive
from metaopt.optimizer import Optimizer

if TYPE_CHECKING:
    from metaopt.levels.scope import Levels

SCALE = 2.0**10  # of losses in float16
LevelLoss = Callable[["Levels", Any], Tensor | dict[str, Tensor]]


class Level:
    """A problem min_w L(w, other levels), to be connected to others by edges.

    Args:
        name: how losses refer to it: `levels.NAME`.
        model: any module; its trainable parameters are w. Frozen parameters are constants, tied
            weights are one.
        loss: `loss(levels, batch)` returns a scalar, or a dict with "loss" and further scalars to
            be logged. `levels.NAME(x)` calls a level's model with that level's present parameters,
            `levels.NAME.params` is the dict of these. The running statistics of the level's own
            model are updated by the calls that its own loss makes, and by no other.
        optimizer: makes the level's updates. Gradient clipping and schedules are part of it:
            `ClipNorm(1.0, SGD(lr=Cosine(...)))`. It may be the `model` of a level above, or contain
            it: that level then learns the optimizer.
        data: an iterable of batches, trees of tensors: a `DataLoader`, a list, a generator. It is
            begun again when it ends, except for a generator. For one batch that is always the same,
            a list with that batch. Of an object with a method `batch_at(n)`, as `Shuffled` has, the
            batches n = 0, 1, 2, ... None: the loss gets None.
        copies: number of independent problems with parameters of their own, batched under `vmap`.
            The batches of this level, and of the one above it, then have the leading axis `copies`.
        accumulate: number of batches in a step; the loss is the mean over them.
        warmup: number of first steps in which the level stays as it is; the levels below it move.
        allow_unused: parameters that the loss does not depend on get zero gradients instead of an
            error.
        precision: the dtype of `torch.autocast` under which the loss is computed, for example
            `torch.bfloat16`.
        loss_scale: for `precision=torch.float16`: a power of two, by which derivatives are
            multiplied while they are computed in the loss, those of every order, and divided again
            as they leave it. Numbers from 6e-8 / loss_scale to 65504 / loss_scale are then kept.
            None: 1024, from 6e-11 to 64.

    Cost:
        With `accumulate`, a gradient takes the memory of one batch, and one more evaluation of the
        loss for each, whose graph is built again on the way back. Second derivatives (`Backprop`,
        `Implicit`, `T1T2`) take the memory of all.

    Raises:
        ValueError: the name is no identifier, nothing is trainable, or a number is out of range.
        TypeError: `model` is no module, `optimizer` no metaopt optimizer, `loss` no function, or a
            setting of another type.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        loss: LevelLoss,
        optimizer: Optimizer,
        data: Iterable[Any] | None = None,
        *,
        copies: int | None = None,
        accumulate: int = 1,
        warmup: int = 0,
        allow_unused: bool = False,
        precision: torch.dtype | None = None,
        loss_scale: float | None = None,
    ):
        _check_name(name)
        _check_kinds(name, model, loss, optimizer, allow_unused, precision)
        for what, value, least in (
            ("accumulate", accumulate, 1),
            ("warmup", warmup, 0),
            ("copies", copies, 1),
        ):
            if value is not None:
                check_count(f"level {name!r}", what, value, least=least)
        self.net = functional(model)
        if not self.net.params:
            raise ValueError(
                f"level {name!r}: the model has no trainable parameters. Is every parameter frozen?"
            )
        self.name, self.model, self.loss, self.optimizer = name, model, loss, optimizer
        self.batches, self.copies, self.accumulate, self.warmup = data, copies, accumulate, warmup
        self.allow_unused, self.precision = allow_unused, precision
        self.loss_scale = _check_scale(name, precision, loss_scale)

    def with_optimizer(self, optimizer: Optimizer) -> Level:
        """Return the same level, of the same model, with another optimizer."""
        level = copy.copy(self)
        level.optimizer = optimizer
        return level

    @property
    def device(self) -> torch.device:
        """The device of the parameters, to which batches are moved."""
        return next(iter(self.net.params.values())).device


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        raise ValueError(
            f"Level: `name` must be an identifier, got {name!r}. Losses refer to the level as "
            f"`levels.NAME`."
        )


def _check_scale(name: str, precision: Any, loss_scale: float | None) -> float:
    """Return the loss scale; 1 where there is none.

    Raises:
        ValueError: it is not a power of two, or the level does not compute in float16.
    """
    if loss_scale is None:
        return SCALE if precision is torch.float16 else 1.0
    if precision is not torch.float16:
        raise ValueError(
            f"level {name!r}: `loss_scale` is for `precision=torch.float16`, got it with "
            f"{precision}, which loses no small numbers. Leave it out."
        )
    scale = check_positive(f"level {name!r}", "loss_scale", loss_scale)
    if math.frexp(scale)[0] != 0.5:
        raise ValueError(
            f"level {name!r}: `loss_scale` must be a power of two, got {loss_scale!r}: others round"
            f" what they multiply. Write {2.0 ** round(math.log2(scale))}."
        )
    return scale


def _check_kinds(
    name: str, model: object, loss: object, optimizer: object, allow_unused: object, precision: Any
) -> None:
    """Raise TypeError for what is of another type."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"level {name!r}: `optimizer` must be a metaopt Optimizer, got "
            f"{type(optimizer).__module__}.{type(optimizer).__name__}. Use one from "
            f"`metaopt.optimizers`, or `mo.from_torch(...)`."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"level {name!r}: `model` must be an nn.Module, got {type(model).__name__}."
        )
    if not callable(loss):
        raise TypeError(
            f"level {name!r}: `loss` must be a function loss(levels, batch), got "
            f"{type(loss).__name__}."
        )
    check_flag(f"level {name!r}", "allow_unused", allow_unused)
    is_dtype = isinstance(precision, torch.dtype) and precision.is_floating_point
    if precision is not None and not is_dtype:
        raise TypeError(
            f"level {name!r}: `precision` must be a floating-point dtype or None, got "
            f"{precision!r}. Write torch.bfloat16."
        )
