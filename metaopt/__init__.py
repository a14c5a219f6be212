"""Optimisation that learns: differentiable inner loops, meta-gradients and learned optimizers on
top of `torch.func`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metaopt import tree
from metaopt._functional import Functional, functional
from metaopt._implicit import implicit
from metaopt._meta_grad import assign_grads, meta_grad
from metaopt._minimize import Minimized, minimize
from metaopt.differentiate import (
    SAMA,
    T1T2,
    Backprop,
    EvolutionStrategy,
    FiniteDifference,
    FirstOrder,
    ForwardMode,
    Implicit,
    InnerLoop,
    Penalty,
    PointRule,
    Rule,
)
from metaopt.errors import NonFiniteError
from metaopt.linear_solve import (
    GMRES,
    BiCGStab,
    ConjugateGradient,
    Direct,
    Neumann,
    NormalCG,
    Nystrom,
    NystromCG,
    Solution,
)
from metaopt.optimizer import Optimizer, apply_updates
from metaopt.optimizer.schedule import Schedule
from metaopt.scan.revolve import Revolve

if TYPE_CHECKING:
    from metaopt import tasks
    from metaopt.diagnostics import (
        HypergradientCheck,
        MeasuredRule,
        RuleComparison,
        compare_rules,
        hypergradient_check,
        metasmoothness,
    )
    from metaopt.interop import from_torch, from_torchopt
    from metaopt.levels import Edge, Level, LevelGraph, Levels
    from metaopt.meta_training import FullUnroll, MetaTraining, Task, TaskFamily, TruncatedBackprop
    from metaopt.meta_training.evaluation import Report, evaluate, tune
    from metaopt.second_order import check_second_order
    from metaopt.train import TensorBoardLogger, Trainer

__version__ = "0.2.0"

__all__ = [
    "GMRES",
    "SAMA",
    "T1T2",
    "Backprop",
    "BiCGStab",
    "ConjugateGradient",
    "Direct",
    "Edge",
    "EvolutionStrategy",
    "FiniteDifference",
    "FirstOrder",
    "ForwardMode",
    "FullUnroll",
    "Functional",
    "HypergradientCheck",
    "Implicit",
    "InnerLoop",
    "Level",
    "LevelGraph",
    "Levels",
    "MeasuredRule",
    "MetaTraining",
    "Minimized",
    "Neumann",
    "NonFiniteError",
    "NormalCG",
    "Nystrom",
    "NystromCG",
    "Optimizer",
    "Penalty",
    "PointRule",
    "Report",
    "Revolve",
    "Rule",
    "RuleComparison",
    "Schedule",
    "Solution",
    "Task",
    "TaskFamily",
    "TensorBoardLogger",
    "Trainer",
    "TruncatedBackprop",
    "apply_updates",
    "assign_grads",
    "check_second_order",
    "compare_rules",
    "evaluate",
    "from_torch",
    "from_torchopt",
    "functional",
    "hypergradient_check",
    "implicit",
    "meta_grad",
    "metasmoothness",
    "minimize",
    "tasks",
    "tree",
    "tune",
]

# The core is imported with the package, what stands on it when it is asked for: a program pays for
# what it uses.
ON_DEMAND = {
    "diagnostics": [
        "HypergradientCheck",
        "MeasuredRule",
        "RuleComparison",
        "compare_rules",
        "hypergradient_check",
        "metasmoothness",
    ],
    "interop": ["from_torch", "from_torchopt"],
    "levels": ["Edge", "Level", "LevelGraph", "Levels"],
    "meta_training": [
        "FullUnroll",
        "MetaTraining",
        "Report",
        "Task",
        "TaskFamily",
        "TruncatedBackprop",
        "evaluate",
        "tune",
    ],
    "second_order": ["check_second_order"],
    "tasks": [],
    "train": ["TensorBoardLogger", "Trainer"],
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562): `metaopt.levels` and `metaopt.Level` import the module
    `metaopt.levels`.
    """
    for module, names in ON_DEMAND.items():
        if name == module:
            return import_module(f"metaopt.{module}")
        if name in names:
            globals()[name] = getattr(import_module(f"metaopt.{module}"), name)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *ON_DEMAND})
