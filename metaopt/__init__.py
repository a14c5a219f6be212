"""Optimisation that learns: differentiable inner loops, meta-gradients and learned optimizers on top of `torch.func`."""

from metaopt import tasks, tree
from metaopt.diagnostics import (
    HypergradientCheck,
    MeasuredRule,
    RuleComparison,
    compare_rules,
    hypergradient_check,
    metasmoothness,
)
from metaopt.differentiate import (
    SAMA,
    T1T2,
    Backprop,
    EvolutionStrategy,
    FiniteDifference,
    FirstOrder,
    ForwardMode,
    Implicit,
    Penalty,
)
from metaopt.errors import NonFiniteError
from metaopt.functional import Functional, functional
from metaopt.implicit import implicit
from metaopt.interop import from_torch, from_torchopt
from metaopt.levels import Edge, Level, LevelGraph
from metaopt.linear_solve import GMRES, BiCGStab, ConjugateGradient, Direct, Neumann, NormalCG, Nystrom, NystromCG, Solution
from metaopt.meta_grad import assign_grads, meta_grad
from metaopt.meta_training import FullUnroll, MetaTraining, Report, Task, TaskFamily, TruncatedBackprop, evaluate, tune
from metaopt.minimize import Minimized, minimize
from metaopt.optimizer import Optimizer, apply_updates
from metaopt.optimizer.schedule import Schedule
from metaopt.scan.revolve import Revolve
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
    "Level",
    "LevelGraph",
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
    "Report",
    "Revolve",
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
