"""Where the numbers of a training run go."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, TextIO

import numpy as np
from torch import Tensor

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


class Logger(Protocol):
    """Takes the metrics of a step."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record named numbers at a step."""
        ...

    def close(self) -> None:
        """Write out what is pending."""
        ...


class PictureLogger(Logger, Protocol):
    """A logger that also takes what callbacks draw: of weights, of learned updates."""

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Record how the entries of a tensor are distributed."""
        ...

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Record a figure of matplotlib."""
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

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Record the entries as a histogram."""
        self._writer.add_histogram(name, values.detach(), step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Record a figure as an image; it stays open."""
        self._writer.add_figure(name, figure, step, close=False)

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


class JSONLogger:
    """Adds a line of JSON for each step to a file: `{"step": 3, "loss": 0.25}`.

    Numbers that are not finite are the texts "nan", "inf" and "-inf", which JSON has no numbers
    for. After a resumption, the steps behind the checkpoint are there twice; the later line counts.

    Args:
        path: of the file; its directory is made if need be.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def _open(self) -> TextIO:
        return self.path.open("a", buffering=1)  # by line: it can be read on the way

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics in one line."""
        numbers = {
            name: value if math.isfinite(value) else str(value) for name, value in metrics.items()
        }
        if self._file.closed:  # by an earlier run of the same trainer
            self._file = self._open()
        self._file.write(json.dumps({"step": step, **numbers}) + "\n")

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Write quantiles of the entries."""
        if not values.numel():
            return
        found = np.quantile(values.detach().double().cpu().numpy(), QUANTILES)
        self.log(step, {f"{name}/{q:g}": float(value) for q, value in zip(QUANTILES, found)})

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Write a figure beside the file."""
        place = f"{self.path.stem}-{name.replace('/', '-')}-{step:08}.png"
        figure.savefig(self.path.with_name(place))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleLogger:
    """Prints the metrics, at most once in a number of seconds.

    Args:
        seconds: between lines.
    """

    def __init__(self, seconds: float = 10.0):
        self.seconds = seconds
        self._last = -math.inf

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Print them, if it is time."""
        now = time.perf_counter()
        if now - self._last >= self.seconds:
            self._last = now
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            print(f"step {step}: {numbers}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Do nothing: all is printed."""


class RunLogger:
    """Logs to Weights & Biases or to trackio, which have the same functions.

        wandb.init(project="levels")
        logger = mo.RunLogger(wandb)

    Args:
        backend: the module `wandb` or `trackio`, in which a run has been begun with `init`.
    """

    def __init__(self, backend: ModuleType):
        self._backend: Any = backend

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of a step."""
        self._backend.log(dict(metrics), step=step)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Record the entries as a histogram."""
        entries = values.detach().float().cpu().flatten().numpy()
        self._backend.log({name: self._backend.Histogram(entries)}, step=step)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Record a figure as an image."""
        figure.canvas.draw()
        pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
        self._backend.log({name: self._backend.Image(pixels)}, step=step)

    def close(self) -> None:
        """End the run."""
        self._backend.finish()


class Several:
    """Passes everything on to several loggers; histograms and figures to those that take them.

    All of them are called, also if one raises.
    """

    def __init__(self, *loggers: Logger):
        self.loggers = loggers

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record named numbers at a step."""
        self._call("log", step, metrics)

    def histogram(self, step: int, name: str, values: Tensor) -> None:
        """Record how the entries of a tensor are distributed."""
        self._call("histogram", step, name, values)

    def figure(self, step: int, name: str, figure: Any) -> None:
        """Record a figure of matplotlib."""
        self._call("figure", step, name, figure)

    def close(self) -> None:
        """Write out what is pending."""
        self._call("close")

    def _call(self, method: str, *given: Any) -> None:
        errors = []
        for one in self.loggers:
            call = getattr(one, method, None)
            if call is None:
                continue
            try:
                call(*given)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]
