"""Who takes part in which comparison, the one that the others are measured by first."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import metaopt as mo
from contenders import problems
from contenders.attention import Attention
from contenders.large_model import Scale
from contenders.optimizer_steps import OptimizerSteps
from contenders.problems import LogisticRegression
from contenders.quadratics import Bilevel
from contenders.short_steps import TrainerLoop

BETTY_VERSION = "0.2.1"
# its metadata asks for Python below 3.11, though it runs on later ones
INSTALL = {"betty": f"pip install --no-deps --ignore-requires-python betty-ml=={BETTY_VERSION}"}


@dataclass(frozen=True)
class Side:
    """A contender: `contenders.{module}.{function}(problem, **options)`, see `Comparison.function`.

    Attributes:
        name: in the tables.
        module: with_LIBRARY, or by_hand.
        options: how it is to do it.
        lengths: numbers of inner steps, or of whatever `Comparison.length` names, for which its
            memory is measured.
        error: by how much its gradient may differ from the exact one, of its norm, where the
            problem has one; an approximation must only be better than no gradient.
    """

    name: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = ()
    error: float = 1e-6

    @property
    def missing(self) -> str | None:
        """What keeps it from taking part, and how to mend that; None if it can.

        Nothing is imported.
        """
        library = self.module.removeprefix("with_")
        if library == self.module:
            return None
        how = f"`{INSTALL.get(library, 'pip install .[bench]')}` brings it."
        if find_spec(library) is None:
            return f"{library} is not installed. {how}"
        if library == "betty" and _numbers(version("betty-ml")) < _numbers(BETTY_VERSION):
            found = version("betty-ml")
            return (
                f"betty-ml must be {BETTY_VERSION}, got {found}: older ones have other arguments. "
                f"{how}"
            )
        return None


@dataclass(frozen=True)
class Comparison:
    """A problem and those who solve it."""

    problem: Any
    sides: Sequence[Side]
    tolerance: float = 1e-4
    """by how much a tensor of the gradient may differ, of its norm: float32, and sums in another
    order. Where the problem has an exact gradient, each side's `error` says it
    """
    function: str | None = None
    """of each library's module; by default the comparison's name"""
    length: str = "steps"
    """the field of the problem that memory is measured for several values of"""
    needs: str | None = None
    """a package without which nobody can take part"""
    repeats: int = 1000
    """timings of each side at most"""

    @property
    def missing(self) -> str | None:
        """What keeps everybody from taking part, and how to mend that; None if nothing does."""
        if self.needs is None or find_spec(self.needs) is not None:
            return None
        return f"{self.needs} is not installed. `pip install {self.needs}` brings it."


STEPS, REVOLVE = {"memory": "steps"}, {"memory": mo.Revolve(16)}
FEW, MANY = (16, 64, 256), (16, 64, 256, 2000)
TOKENS = (64, 256, 1024, 2048, 4096)
BETTY, MENDED = Side("Betty", "with_betty"), Side("Betty, its CG mended", "with_betty")
EAGER = [Side("PyTorch by hand", "by_hand"), Side("metaopt", "with_metaopt")]
LEVELS = [*EAGER, Side("metaopt, compiled", "with_metaopt", {"compile": True})]
TRAINING = [
    Side("metaopt", "with_metaopt"),
    Side("metaopt, compiled", "with_metaopt", {"compile": True}),
    Side("JAX jit, vmap, scan", "with_jax"),
]
REGRESSION = "logistic_regression"


def at_scale(problem: Scale) -> Comparison:
    """Return a comparison on a large model."""
    rule = "Betty" if problem.rule == "darts" else "Betty, its SAMA mended"
    sides = [
        Side(rule, "with_betty", lengths=(1,)),
        Side("PyTorch by hand", "by_hand", lengths=(1,)),
        Side("metaopt", "with_metaopt", lengths=(1,)),
    ]
    # The finite difference divides the rounding of float32 by its radius.
    return Comparison(problem, sides, 3e-2, "scale", needs="transformers", repeats=3)


def at_lengths(problem: Attention, tokens: tuple[int, ...]) -> Comparison:
    """Return a comparison of attention to sequences of these lengths."""
    sides = [
        Side("PyTorch, its plain kernel", "by_hand", lengths=tokens),
        Side("metaopt", "with_metaopt", lengths=tokens),
    ]
    return Comparison(problem, sides, function="attention", length="tokens", repeats=10)


def learned(name: str, **options: Any) -> Side:
    """Return our side that makes a step of a learned optimizer."""
    given = ", ".join(f"{option}={value}" for option, value in options.items())
    return Side(f"{name}({given})", "with_metaopt", {"name": name, **options})


def stepped(*sizes: int) -> Comparison:
    """Return a comparison of optimizers on a dense network with layers of these sizes.

    Each goes its own way, so that parameters must only agree in their names and shapes.
    """
    sides = [
        Side("torch.optim.Adam(foreach=True)", "by_hand"),
        *map(learned, ("NNAdam", "AdafactorMLP", "RNNMLP", "MLPOptimizer")),
        learned("ControlledMLP", orthogonal=False),
        learned("ControlledMLP"),
    ]
    return Comparison(OptimizerSteps(sizes), sides, math.inf, "optimizer_steps")


def differentiated(rule: str, error: float = 1e-6) -> Side:
    """Return our side that differentiates a solution by this rule."""
    return Side(f"metaopt, {rule}", "with_metaopt", {"rule": rule}, error=error)


def on_quadratics(problem: Bilevel, *rough: Side) -> Comparison:
    """Return a comparison of exact solvers, and of approximations."""
    exact = [
        Side("PyTorch by hand, CG", "by_hand"),
        Side("Betty, its CG mended", "with_betty", {"rule": "cg"}),
        *map(differentiated, ("CG", "GMRES", "BiCGStab", "NystromCG", "Direct")),
    ]
    return Comparison(problem, [*exact, *rough], function="bilevel", repeats=3)


ROUGH = [differentiated(rule, 1.0) for rule in ("Neumann", "Nystrom", "T1T2")]
AS_ROUGH = [  # of the same errors, but for truncation's
    Side("Betty, Neumann", "with_betty", {"rule": "neumann"}, error=1.0),
    *(
        differentiated(rule, 1.0)
        for rule in ("Backprop", "Backprop, truncated", "FiniteDifference", "SAMA")
    ),
]


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
        # Rounding decides here and there which entry a pooling takes; in float64 the gradients
        # agree to 1e-13.
        tolerance=1e-2,
    ),
    "lstm": Comparison(
        problems.LSTM(),
        [
            Side("PyTorch by hand", "by_hand", lengths=(20, 100)),
            Side("metaopt", "with_metaopt", lengths=(20, 100)),
            Side("metaopt, compiled", "with_metaopt", {"compile": True}),
            Side('metaopt, memory="steps"', "with_metaopt", STEPS, lengths=(20, 100)),
            Side(
                'metaopt, memory="steps", compiled',
                "with_metaopt",
                {**STEPS, "compile": True},
                lengths=(20, 100),
            ),
            Side("JAX jit, scan, checkpoint", "with_jax", lengths=(20, 100)),
            Side("JAX jit, scan", "with_jax", {"remat": False}, lengths=(20, 100)),
        ],
    ),
    "meta-training": Comparison(
        problems.MetaTraining("backprop"), TRAINING, function="meta_training"
    ),
    "meta-training-nres": Comparison(
        problems.MetaTraining("nres"), TRAINING, function="meta_training"
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
        [BETTY, *LEVELS],
        # The finite difference divides the rounding of float32 by its radius.
        tolerance=1e-3,
    ),
    "imaml": Comparison(problems.IMAML(), [MENDED, *LEVELS]),
    # The finite difference divides the rounding of float32 by its radius.
    "regression-darts": Comparison(LogisticRegression("darts"), [BETTY, *EAGER], 1e-3, REGRESSION),
    "regression-cg": Comparison(LogisticRegression("cg"), [MENDED, *EAGER], function=REGRESSION),
    "regression-neumann": Comparison(
        LogisticRegression("neumann"), [BETTY, *EAGER], function=REGRESSION
    ),
    # the limit is 3 %
    "trainer": Comparison(
        TrainerLoop(),
        [
            Side("loop by hand", "with_metaopt", {"by_hand": True}),
            Side("Trainer, with a checkpoint", "with_metaopt"),
        ],
    ),
    "many-tensors": Comparison(
        problems.ManyTensors(),
        [
            Side("higher", "with_higher"),
            Side("TorchOpt", "with_torchopt"),
            *EAGER,
        ],
        # In float64 the gradients agree to 1e-13; 1 - beta^t loses digits in float32.
        tolerance=1e-3,
    ),
    "attention": at_lengths(Attention(), TOKENS),
    "attention-causal": at_lengths(Attention(sees="causal"), (2048,)),
    "attention-masked": at_lengths(Attention(sees="masked"), (2048,)),
    "scale-darts": at_scale(Scale("darts")),
    "scale-sama": at_scale(Scale("sama")),
    "scale-darts-64": at_scale(Scale("darts", batch=64)),
    "scale-sama-64": at_scale(Scale("sama", batch=64)),
    "scale-darts-frozen": at_scale(Scale("darts", batch=64, frozen=4)),
    "scale-sama-frozen": at_scale(Scale("sama", batch=64, frozen=4)),
    "scale-darts-frozen-16": at_scale(Scale("darts", frozen=4)),
    "scale-sama-frozen-16": at_scale(Scale("sama", frozen=4)),
    "bilevel-100": on_quadratics(Bilevel(1e2, products=90), *ROUGH, *AS_ROUGH),
    "bilevel-10000": on_quadratics(Bilevel(1e4, products=700), *ROUGH),
    "optimizer-steps-26k": stepped(784, 32, 32, 10),
    "optimizer-steps-269k": stepped(784, 256, 256, 10),
    "optimizer-steps-5m": stepped(784, 1024, 2048, 1024, 10),
}


def function_of(comparison: str) -> str:
    """Return the name that a comparison's contenders have in their modules."""
    return COMPARISONS[comparison].function or comparison.replace("-", "_")


def _numbers(release: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", release)[:3]]
