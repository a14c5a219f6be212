"""What a loss depends on, found by evaluating it once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metaopt import tree
from metaopt._functional import Functional, Params
from metaopt.closure import find_hidden, name_tracked
from metaopt.exact_ops import Watching, needs_care
from metaopt.levels.level import Level
from metaopt.levels.scope import Scene, Shown, evaluate
from metaopt.transforms import is_tracked
from metaopt.tree import Tree

Pair = tuple[str, str]  # a level, and a parameter or buffer of it


@dataclass(frozen=True)
class Reading:
    """What one evaluation of a level's loss showed.

    Attributes:
        levels: names of the levels that it read, its own not among them.
        params: (level, parameter) pairs that its value depends on.
        buffers: (level, buffer) pairs that its value depends on, of the buffers that have
            derivatives.
        moves: buffer of its own -> the (level, parameter or buffer) pairs that it depends on after
            one evaluation.
        dtype: that of the loss.
        metrics: names and dtypes of the scalars that it returns beside the loss.
        is_random: whether it drew from the global random generators.
        is_delicate: whether it called a function whose derivatives in reverse mode need care, or a
            module that it may call on another batch does; see `any_order`. Forward derivatives are
            always taken with care.
    """

    levels: frozenset[str]
    params: frozenset[Pair]
    buffers: frozenset[Pair]
    moves: Mapping[str, frozenset[Pair]]
    dtype: torch.dtype
    metrics: Mapping[str, torch.dtype]
    is_random: bool
    is_delicate: bool


def read_all(
    read_one: Callable[[str, Collection[Pair]], Reading], levels: Collection[str]
) -> dict[str, Reading]:
    """Return what each level's loss depends on.

    A buffer has a derivative if the loss that updates it leaves one in it: an average of weights
    does, running statistics of a norm layer do not. Those that have are differentiated in a second
    reading, and as long as further ones turn up that depend on them.

    Args:
        read_one: (level, buffers to be differentiated) -> reading.
        levels: names.
    """
    variable: frozenset[Pair] = frozenset()
    while True:
        readings = {name: read_one(name, variable) for name in levels}
        found = frozenset(
            (name, key) for name, reading in readings.items() for key in reading.moves
        )
        if found <= variable:
            return readings
        variable |= found


def read(
    level: Level,
    nets: Mapping[str, Functional],
    batch: Tree,
    *,
    buffers: Collection[Pair] = (),
    keeps_statistics: bool = True,
) -> Reading:
    """Evaluate the level's loss once, at the present values of all models, and note what it reads.

    The global random state is put back. Cost: two forward passes and a backward pass; one more of
    each where the level has buffers, whose first step may differ from later ones.

    Args:
        level: the level.
        nets: every level's model.
        batch: what the loss gets.
        buffers: (level, buffer) pairs that are differentiated as well.
        keeps_statistics: whether the level's own buffers are updated.

    Raises:
        ValueError: the loss fails without data, reads an unknown level, or reaches a tensor that
            requires grad by itself.
    """
    # made here: what is noted below is what the loss calls
    at, still = _make_scene(nets, buffers, True), _make_scene(nets, buffers, False)
    names: set[str] = set()
    rows = {level.name: batch}
    leaves = {
        (name, key): leaf for name, shown in at.items() for key, leaf in shown["params"].items()
    }
    leaves |= {pair: at[pair[0]]["buffers"][pair[1]] for pair in sorted(buffers)}
    call = functools.partial(evaluate, level, nets, rows=rows, keeps_statistics=keeps_statistics)
    with torch.random.fork_rng(), torch.enable_grad(), Watching() as mode:
        before = _random_state(level.device)
        try:
            loss, after = call(at, noted=names)
            is_random = not torch.equal(before, _random_state(level.device))
            alone, _ = call(still)
        except (TypeError, AttributeError) as error:
            if level.batches is not None:
                raise
            raise ValueError(
                f"level {level.name!r} has no data, and its loss fails on the batch None: {error}. "
                f"Pass `data=` to the level."
            ) from error
        if is_tracked(alone) and find_hidden([alone], lambda: [call(still)[0]]) is not None:
            raise ValueError(
                f"level {level.name!r}: its loss reaches {name_tracked(level.loss, alone)} "
                f"through its closure, and that requires grad. Read the parameters of levels as "
                "`levels.NAME(x)` or `levels.NAME.params`; detach what is constant."
            )
        moves = {key: _find_sources(buffer, leaves) for key, buffer in after["buffers"].items()}
        sources = _find_sources(loss, leaves)
        if moves:
            # A buffer may be filled by the first step, and depend on something from the second on.
            own = _begin_again(level.name, after["buffers"], buffers, leaves)
            shown: Shown = {"params": at[level.name]["params"], "buffers": own}
            loss, after = call({**at, level.name: shown}, noted=names)
            sources |= _find_sources(loss, leaves)
            for key, buffer in after["buffers"].items():
                moves[key] |= _find_sources(buffer, leaves)
    return Reading(
        levels=frozenset(names - {level.name}),
        params=sources - frozenset(buffers),
        buffers=sources & frozenset(buffers),
        moves={key: pairs for key, pairs in moves.items() if pairs},
        dtype=loss.dtype,
        metrics={name: metric.dtype for name, metric in after["metrics"].items()},
        is_random=is_random,
        is_delicate=mode.found or any(needs_care(nets[one].model) for one in {level.name, *names}),
    )


def _make_scene(
    nets: Mapping[str, Functional], buffers: Collection[Pair], is_variable: bool
) -> Scene:
    """Return fresh tensors of the present values; parameters and some buffers are variables."""
    return {
        name: {
            "params": {
                key: param.detach().requires_grad_(is_variable) for key, param in net.params.items()
            },
            "buffers": {
                key: buffer.detach().requires_grad_(is_variable)
                if (name, key) in buffers
                else buffer
                for key, buffer in net.buffers.items()
            },
        }
        for name, net in nets.items()
    }


def _begin_again(
    level: str, values: Params, buffers: Collection[Pair], leaves: dict[Pair, Tensor]
) -> Params:
    """Return a level's buffers as fresh tensors; put those that are variables into `leaves`."""
    own = {
        key: value.detach().requires_grad_((level, key) in buffers) for key, value in values.items()
    }
    leaves |= {(level, key): own[key] for name, key in buffers if name == level}
    return own


def _find_sources(value: Tensor, leaves: Mapping[Pair, Tensor]) -> frozenset[Pair]:
    """Return the names of the leaves that `value` depends on."""
    if not value.requires_grad:
        return frozenset()
    grads = torch.autograd.grad(
        tree.as_real(value).sum(), list(leaves.values()), retain_graph=True, allow_unused=True
    )
    return frozenset(pair for pair, grad in zip(leaves, grads, strict=True) if grad is not None)


def _random_state(device: torch.device) -> Tensor:
    """Return the state of the generators of the CPU and, if it is a GPU, of the device."""
    state = torch.get_rng_state()
    return torch.cat([state, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else state
