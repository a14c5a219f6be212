"""What a run tells its logger: without ever ending for it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping

from metaopt.train.loggers import Logger
from metaopt.train.memory import peak_memory

SECONDS_BETWEEN_MEASURES = 1.0  # of pace and memory


class Reporting:
    """A logger, or none, which gets pace and memory too, and whose errors are said once.

    Args:
        logger: gets what is reported; None for nobody.
        step: the one that the run begins after.
    """

    def __init__(self, logger: Logger | None, step: int):
        self._logger = logger
        self._has_failed = False
        self._measured, self._measured_at = time.perf_counter(), step

    @property
    def is_heard(self) -> bool:
        """Whether there is a logger."""
        return self._logger is not None

    def log_step(
        self, step: int, values: Mapping[str, float], metrics: Mapping[str, float]
    ) -> None:
        """Hand on the values and metrics of a step, and now and then pace and memory."""
        if self._logger is None:
            return
        measures = {}
        now = time.perf_counter()
        if now - self._measured >= SECONDS_BETWEEN_MEASURES:
            pace = (step - self._measured_at) / (now - self._measured)
            measures = {"steps per second": pace, "peak memory (MiB)": peak_memory()}
            self._measured, self._measured_at = now, step
        self.log(step, {**values, **metrics, **measures})

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand on the metrics."""
        if self._logger is not None:
            self._try(step, lambda logger: logger.log(step, metrics))

    def close(self, step: int) -> None:
        """Close the logger."""
        self._try(step, lambda logger: logger.close())

    def _try(self, step: int, call: Callable[[Logger], None]) -> None:
        if self._logger is None:
            return
        try:
            call(self._logger)
        except Exception as error:
            if not self._has_failed:
                self._has_failed = True
                warnings.warn(
                    f"The logger {type(self._logger).__name__} failed at step {step}: {error!r}. "
                    "The training goes on; this is said once.",
                    stacklevel=2,
                )
