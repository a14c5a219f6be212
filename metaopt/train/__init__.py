"""Running a training: the loop, its checkpoints and its loggers."""

from metaopt.train.arguments import Callback, InnerCallback, Training
from metaopt.train.checkpoint import Checkpoints
from metaopt.train.loggers import (
    ConsoleLogger,
    JSONLogger,
    Logger,
    PictureLogger,
    RunLogger,
    Several,
    TensorBoardLogger,
)
from metaopt.train.state_file import CheckpointError
from metaopt.train.trainer import Trainer

__all__ = [
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
    "Training",
]
