"""Running a training: the loop, its checkpoints and its loggers."""

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
from metaopt.train.trainer import Callback, Trainer, Training

__all__ = [
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "ConsoleLogger",
    "JSONLogger",
    "Logger",
    "PictureLogger",
    "RunLogger",
    "Several",
    "TensorBoardLogger",
    "Trainer",
    "Training",
]
