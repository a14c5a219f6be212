"""Who takes part in which comparison, the one that the others are measured by first."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import metaopt as mo
from contenders import problems


@dataclass(frozen=True)
class Side:
    """A contender: `contenders.{module}.{comparison}(problem, **options)`.

    Attributes:
        name: in the tables.
        module: with_LIBRARY, or by_hand.
        options: how it is to do it.
        lengths: numbers of inner steps for which its memory is measured.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = ()

    @property
    def installed(self) -> bool:
        """Say whether its library is there; nothing is imported."""
        library = self.module.removeprefix("with_")
        return library == self.module or importlib.util.find_spec(library) is not None


@dataclass(frozen=True)
class Comparison:
    """A problem and those who solve it."""

    problem: Any
    sides: Sequence[Side]
    tolerance: float = 1e-4
    """by how much a tensor of the gradient may differ, of its norm: float32, and sums in another order"""


STEPS, REVOLVE = {"memory": "steps"}, {"memory": mo.Revolve(16)}
FEW, MANY = (16, 64, 256), (16, 64, 256, 2000)
COMPARISONS = {
    "sinusoid": Comparison(
        problems.Sinusoid(),
        [
            Side("higher", "with_higher"),
            Side("TorchOpt", "with_torchopt"),
            Side("torch.func by hand", "by_hand"),
            Side("metaopt", "with_metaopt"),
            Side("metaopt, compiled", "with_metaopt", {"compile": True}),
            Side("JAX jit", "with_jax"),
        ],
    ),
    "omniglot": Comparison(
        problems.Omniglot(),
        [
            Side("higher", "with_higher"),
            Side("higher, channels last", "with_higher", {"channels_last": True}),
            Side("TorchOpt", "with_torchopt"),
            Side("metaopt, loop over tasks", "with_metaopt"),
            Side("metaopt, loop, compiled", "with_metaopt", {"compile": True}),
            Side("metaopt, vmap", "with_metaopt", {"chunk_size": 8, "channels_last": False}),
        ],
        # Rounding decides here and there which entry a pooling takes; in float64 the gradients agree to 1e-13.
        tolerance=1e-2,
    ),
    "lstm": Comparison(
        problems.LSTM(),
        [
            Side("PyTorch by hand", "by_hand", lengths=(20, 100)),
            Side("metaopt", "with_metaopt", lengths=(20, 100)),
            Side("metaopt, compiled", "with_metaopt", {"compile": True}),
            Side('metaopt, memory="steps"', "with_metaopt", STEPS, lengths=(20, 100)),
            Side('metaopt, memory="steps", compiled', "with_metaopt", {**STEPS, "compile": True}, lengths=(20, 100)),
            Side("JAX jit, scan, checkpoint", "with_jax", lengths=(20, 100)),
            Side("JAX jit, scan", "with_jax", {"remat": False}, lengths=(20, 100)),
        ],
    ),
    "transformer": Comparison(
        problems.Transformer(),
        [
            Side("higher", "with_higher", lengths=FEW),
            Side("TorchOpt", "with_torchopt", lengths=FEW),
            Side("metaopt", "with_metaopt", lengths=FEW),
            Side('metaopt, memory="steps"', "with_metaopt", STEPS, lengths=FEW),
            Side("metaopt, Revolve(16)", "with_metaopt", REVOLVE, lengths=MANY),
        ],
    ),
    "meta-weight-net": Comparison(
        problems.MetaWeightNet(),
        [
            Side("Betty", "with_betty"),
            Side("PyTorch by hand", "by_hand"),
            Side("metaopt", "with_metaopt"),
            Side("metaopt, compiled", "with_metaopt", {"compile": True}),
        ],
        # The finite difference divides the rounding of float32 by its radius.
        tolerance=1e-3,
    ),
}
