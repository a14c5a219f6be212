"""Where the numbers of a training run go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record named numbers at a step."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


class TensorBoardLogger:
    """Writes TensorBoard events into `directory`.

    Look at them with `tensorboard --logdir DIRECTORY`.
    """

    def __init__(self, directory: str | Path):
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(directory))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record each metric as a scalar."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()
