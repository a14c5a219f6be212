"""Training optimizers, and judging them."""

from metaopt.meta_training.backprop import FullUnroll, TruncatedBackprop
from metaopt.meta_training.estimate import Estimate, Estimator, Gradients
from metaopt.meta_training.evaluation import Report, evaluate, tune
from metaopt.meta_training.evolution import ES, NRES, PES, TruncatedES
from metaopt.meta_training.groups import Families, Groups
from metaopt.meta_training.judging import Contender, Judgement, judge_family
from metaopt.meta_training.meta_training import MetaTraining
from metaopt.meta_training.objective import (
    LastLoss,
    MeanLoss,
    Objective,
    Relative,
    ValidationLoss,
    Window,
)
from metaopt.meta_training.reinforce import Reinforce
from metaopt.meta_training.task import Task, TaskFamily, sample_tasks

__all__ = [
    "ES",
    "NRES",
    "PES",
    "Contender",
    "Estimate",
    "Estimator",
    "Families",
    "FullUnroll",
    "Gradients",
    "Groups",
    "Judgement",
    "LastLoss",
    "MeanLoss",
    "MetaTraining",
    "Objective",
    "Reinforce",
    "Relative",
    "Report",
    "Task",
    "TaskFamily",
    "TruncatedBackprop",
    "TruncatedES",
    "ValidationLoss",
    "Window",
    "evaluate",
    "judge_family",
    "sample_tasks",
    "tune",
]
