"""Training optimizers, and judging them."""

from metaopt.meta_training.estimators import Estimate, Estimator, FullUnroll, TruncatedBackprop
from metaopt.meta_training.evaluation import Report, evaluate, tune
from metaopt.meta_training.meta_training import MetaTraining
from metaopt.meta_training.task import Task, TaskFamily, sample_tasks

__all__ = [
    "Estimate",
    "Estimator",
    "FullUnroll",
    "MetaTraining",
    "Report",
    "Task",
    "TaskFamily",
    "TruncatedBackprop",
    "evaluate",
    "sample_tasks",
    "tune",
]
