"""Optimisation that learns, on top of `torch.func`.

Differentiable inner loops, meta-gradients, graphs of levels and learned optimizers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metaopt import tree
from metaopt._functional import Functional, functional
from metaopt._implicit import implicit
from metaopt._meta_grad import assign_grads, meta_grad
from metaopt._minimize import Minimized, minimize
from metaopt.checks import NonFiniteError
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
from metaopt.distributed import Ranks, join_ranks
from metaopt.linear_solve import (
    GMRES,
    KFAC,
    KFACCG,
    BiCGStab,
    ConjugateGradient,
    Direct,
    KroneckerFactors,
    LinearSolver,
    Neumann,
    NormalCG,
    Nystrom,
    NystromCG,
    Solution,
)
from metaopt.optimizer import Optimizer, apply_updates, with_steps
from metaopt.optimizer.schedule import Schedule
from metaopt.scan.revolve import Revolve

if TYPE_CHECKING:
    from metaopt import tasks
    from metaopt.black_box import (
        Ax,
        Backend,
        BlackBox,
        BoTorch,
        Choice,
        Float,
        Int,
        Journal,
        JsonLines,
        Optuna,
        OptunaJournal,
        RandomSearch,
        Sobol,
        Trial,
    )
    from metaopt.diagnostics import (
        HypergradientCheck,
        MeasuredRule,
        RuleComparison,
        compare_rules,
        hypergradient_check,
        metasmoothness,
    )
    from metaopt.interop import from_torch, from_torchopt
    from metaopt.levels import Edge, Level, LevelGraph, Levels, Shuffled
    from metaopt.meta_training import (
        ES,
        NRES,
        PES,
        Contender,
        Estimate,
        Estimator,
        Families,
        FullUnroll,
        Groups,
        Judgement,
        LastLoss,
        MeanLoss,
        MetaTraining,
        Objective,
        Reinforce,
        Relative,
        Report,
        Task,
        TaskFamily,
        TruncatedBackprop,
        TruncatedES,
        ValidationLoss,
        Window,
        evaluate,
        judge_family,
        tune,
    )
    from metaopt.second_order import check_second_order
    from metaopt.tasks import Episode
    from metaopt.train import (
        Callback,
        CheckpointError,
        Checkpoints,
        ConsoleLogger,
        InnerCallback,
        JSONLogger,
        Logger,
        PictureLogger,
        RunLogger,
        Several,
        TensorBoardLogger,
        Trainer,
    )

__version__ = "0.2.0"

__all__ = [  # noqa: RUF022 - in groups
    # a model as a pure function, and trees of tensors
    "Functional",
    "functional",
    "tree",
    # an inner loop, and the derivative of a solution found elsewhere
    "Minimized",
    "NonFiniteError",
    "implicit",
    "minimize",
    # gradients averaged over tasks
    "Episode",
    "assign_grads",
    "meta_grad",
    # how gradients pass through a loop: exactly
    "Backprop",
    "ForwardMode",
    "Implicit",
    "Revolve",
    # how gradients pass through a loop: with a bias or noise that is stated
    "EvolutionStrategy",
    "FiniteDifference",
    "FirstOrder",
    "Penalty",
    "SAMA",
    "T1T2",
    # to write a rule
    "InnerLoop",
    "PointRule",
    "Rule",
    # linear systems, and to write a solver
    "BiCGStab",
    "ConjugateGradient",
    "Direct",
    "GMRES",
    "KFAC",
    "KFACCG",
    "KroneckerFactors",
    "LinearSolver",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "NystromCG",
    "Solution",
    # optimizers, to use and to write
    "Optimizer",
    "Schedule",
    "apply_updates",
    "from_torch",
    "from_torchopt",
    # levels in a graph; `Levels` is what a loss is given
    "Edge",
    "Level",
    "LevelGraph",
    "Levels",
    # a level without gradients, the space, who suggests, where trials are written down
    "Ax",
    "Backend",
    "BlackBox",
    "BoTorch",
    "Choice",
    "Float",
    "Int",
    "Journal",
    "JsonLines",
    "Optuna",
    "OptunaJournal",
    "RandomSearch",
    "Sobol",
    "Trial",
    # training optimizers and comparing them, and to write a family of tasks or an estimator
    "Contender",
    "ES",
    "Estimate",
    "Estimator",
    "Families",
    "FullUnroll",
    "Groups",
    "Judgement",
    "LastLoss",
    "MeanLoss",
    "MetaTraining",
    "NRES",
    "Objective",
    "PES",
    "Relative",
    "Reinforce",
    "Report",
    "Task",
    "TaskFamily",
    "TruncatedBackprop",
    "TruncatedES",
    "ValidationLoss",
    "Window",
    "evaluate",
    "judge_family",
    "tasks",
    "tune",
    "with_steps",
    # checks of a hypergradient, a rule, a model
    "HypergradientCheck",
    "MeasuredRule",
    "RuleComparison",
    "check_second_order",
    "compare_rules",
    "hypergradient_check",
    "metasmoothness",
    # work shared over processes
    "Ranks",
    "join_ranks",
    # running a training
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "ConsoleLogger",
    "InnerCallback",
    "JSONLogger",
    "Logger",
    "PictureLogger",
    "RunLogger",
    "Several",
    "Shuffled",
    "TensorBoardLogger",
    "Trainer",
]

# The core is imported with the package, what stands on it when it is asked for: a program pays for
# what it uses.
ON_DEMAND = {
    "black_box": [
        "Ax",
        "Backend",
        "BlackBox",
        "BoTorch",
        "Choice",
        "Float",
        "Int",
        "Journal",
        "JsonLines",
        "Optuna",
        "OptunaJournal",
        "RandomSearch",
        "Sobol",
        "Trial",
    ],
    "diagnostics": [
        "HypergradientCheck",
        "MeasuredRule",
        "RuleComparison",
        "compare_rules",
        "hypergradient_check",
        "metasmoothness",
    ],
    "interop": ["from_torch", "from_torchopt"],
    "levels": ["Edge", "Level", "LevelGraph", "Levels", "Shuffled"],
    "meta_training": [
        "Contender",
        "ES",
        "Estimate",
        "Estimator",
        "Families",
        "FullUnroll",
        "Groups",
        "Judgement",
        "LastLoss",
        "MeanLoss",
        "MetaTraining",
        "NRES",
        "Objective",
        "PES",
        "Relative",
        "Reinforce",
        "Report",
        "Task",
        "TaskFamily",
        "TruncatedBackprop",
        "TruncatedES",
        "ValidationLoss",
        "Window",
        "evaluate",
        "judge_family",
        "tune",
    ],
    "second_order": ["check_second_order"],
    "tasks": ["Episode"],
    "train": [
        "Callback",
        "CheckpointError",
        "Checkpoints",
        "ConsoleLogger",
        "InnerCallback",
        "JSONLogger",
        "Logger",
        "PictureLogger",
        "RunLogger",
        "Several",
        "TensorBoardLogger",
        "Trainer",
    ],
}


def __getattr__(name: str) -> Any:
    """Import what is asked for (PEP 562).

    `metaopt.levels` and `metaopt.Level` import the module `metaopt.levels`.
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
