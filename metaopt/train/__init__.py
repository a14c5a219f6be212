"""Running a training: the loop and its loggers."""

from metaopt.train.loggers import Logger, TensorBoardLogger
from metaopt.train.trainer import Trainer, Training

__all__ = ["Logger", "TensorBoardLogger", "Trainer", "Training"]
