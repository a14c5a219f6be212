"""What a loss depends on, found by evaluating it once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt.closure import tracked_names
from metaopt.functional import Functional
from metaopt.kernels import Watching
from metaopt.levels.level import Level
from metaopt.levels.view import Scene, evaluate
from metaopt.transforms import is_tracked
from metaopt.tree import Tree


@dataclass(frozen=True)
class Reading:
    """What one evaluation of a level's loss showed.

    Attributes:
        levels: names of the levels that it read, its own not among them.
        params: (level, parameter) pairs that its value depends on.
        dtype: that of the loss.
        metrics: names and dtypes of the scalars that it returns beside the loss.
        is_random: whether it drew from the global random generators.
        is_delicate: whether it called a function whose derivatives in reverse mode need care, see `any_order`. Forward derivatives
            are always taken with care.
    """

    levels: frozenset[str]
    params: frozenset[tuple[str, str]]
    dtype: torch.dtype
    metrics: Mapping[str, torch.dtype]
    is_random: bool
    is_delicate: bool


def read(level: Level, nets: Mapping[str, Functional], batch: Tree) -> Reading:
    """Evaluate the level's loss once, at the present values of all models, and note what it depends on.

    The global random state is put back. Cost: two forward passes and a backward pass.

    Raises:
        ValueError: the loss fails without data, reads an unknown level, or reaches a tensor that requires grad by itself.
    """

    def scene(variable: bool) -> Scene:
        return {
            name: {
                "params": {key: param.detach().requires_grad_(variable) for key, param in net.params.items()},
                "buffers": net.buffers,
            }
            for name, net in nets.items()
        }

    at, still = scene(True), scene(False)  # here: what is noted below is what the loss calls
    names: set[str] = set()
    leaves = {(name, key): leaf for name, shown in at.items() for key, leaf in shown["params"].items()}
    with torch.random.fork_rng(), torch.enable_grad(), Watching() as mode:
        before = _random_state(level.device)
        try:
            found = evaluate(level, nets, at, batch, read=names)
            is_random = not torch.equal(before, _random_state(level.device))
            alone = evaluate(level, nets, still, batch)
        except (TypeError, AttributeError) as error:
            if level.batches is not None:
                raise
            raise ValueError(
                f"level {level.name!r} has no data, and its loss fails on the batch None: {error}. Pass `data=` to the level."
            ) from error
        if is_tracked(alone.loss):
            raise ValueError(
                f"level {level.name!r}: its loss reaches {tracked_names(level.loss, alone.loss)} through its closure, and that "
                "requires grad. Read the parameters of levels as `levels.NAME(x)` or `levels.NAME.params`; detach what is constant."
            )
        grads = torch.autograd.grad(found.loss, list(leaves.values()), allow_unused=True) if found.loss.requires_grad else ()
    metrics = {name: metric.dtype for name, metric in found.metrics.items()}
    used = frozenset(key for key, grad in zip(leaves, grads, strict=bool(grads)) if grad is not None)
    return Reading(frozenset(names - {level.name}), used, found.loss.dtype, metrics, is_random, mode.found)


def _random_state(device: torch.device) -> Tensor:
    """Return the state of the generators of the CPU and, if it is a GPU, of the device."""
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return torch.cat(states)
