"""Running a step again exactly: what it depends on besides its arguments."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from metaopt import tree
from metaopt.tree import Tree


@dataclass(frozen=True)
class Ambient:
    """The state of torch's random generators, and the autocast mode, at one moment.

    Attributes:
        random: state of the CPU's generator.
        cuda: device index -> state of that device's generator.
        autocast: device type -> arguments of `torch.autocast`.
    """

    random: Tensor
    cuda: dict[int, Tensor]
    autocast: dict[str, dict[str, Any]]

    @classmethod
    def now(cls, leaves: Iterable[Any], before: Ambient | None = None) -> Ambient:
        """Return the present state, for the devices that the leaves are on.

        Random numbers are rare: a state that is the same as `before` is shared with it, since many
        blocks of 5 KB that live on between large ones that come and go keep the allocator from
        using memory again.
        """
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        now = cls.of_generators(devices)
        if before is not None and torch.equal(now.random, before.random):
            now = replace(now, random=before.random)
        kinds = {device.type for device in devices}
        return replace(
            now,
            autocast={
                kind: _autocast(kind) for kind in kinds if torch.amp.is_autocast_available(kind)
            },
        )

    @classmethod
    def of_generators(cls, devices: Collection[torch.device]) -> Ambient:
        """Return the present state of the generators alone."""
        cuda = {
            device.index: torch.cuda.get_rng_state(device)
            for device in devices
            if device.type == "cuda"
        }
        return cls(torch.get_rng_state(), cuda, {})

    @classmethod
    def after(cls, generator: torch.Generator, leaves: Iterable[Any]) -> Ambient:
        """Return the present autocast mode with the numbers that a CPU `generator` would draw.

        On a GPU others of its seed are drawn.
        """
        present, seed = cls.now(leaves), generator.initial_seed()
        cuda = {
            index: torch.Generator(f"cuda:{index}").manual_seed(seed).get_state()
            for index in present.cuda
        }
        return replace(present, random=generator.get_state(), cuda=cuda)

    def draws_as(self, other: Ambient) -> bool:
        """Return True if the same random numbers come next."""
        pairs = [(self.random, other.random), *[(self.cuda[i], other.cuda[i]) for i in self.cuda]]
        return all(torch.equal(one, two) for one, two in pairs)

    def reinstate(self) -> None:
        """Go back to this random state for good: a loop that others ran has been taken over."""
        torch.set_rng_state(self.random)
        for index, state in self.cuda.items():
            torch.cuda.set_rng_state(state, index)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """While entered, this state holds; afterwards the one before does."""
        cuda = {index: torch.cuda.get_rng_state(index) for index in self.cuda}
        before = replace(self, random=torch.get_rng_state(), cuda=cuda)
        others = {kind: mode for kind, mode in self.autocast.items() if mode != _autocast(kind)}
        try:
            with ExitStack() as stack:
                for kind, mode in others.items():
                    stack.enter_context(torch.autocast(kind, **mode))
                self.reinstate()
                yield
        finally:
            before.reinstate()


def _autocast(kind: str) -> dict[str, Any]:
    return {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}


@contextmanager
def drawn_again(*values: Tree) -> Iterator[None]:
    """While entered, the random numbers are those that will be drawn once more afterwards.

    Args:
        values: trees of tensors, on the devices whose generators are wound back. Under
            `torch.compile` none is.
    """
    with (
        nullcontext()
        if torch.compiler.is_compiling()
        else Ambient.now(tree.leaves(values)).restored()
    ):
        yield
