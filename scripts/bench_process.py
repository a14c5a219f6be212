"""One contender of `bench.py` in a process of its own, on its own cores, that runs when asked."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from contenders.sides import Side

SHORTEST = 0.1  # seconds that one repetition takes at least
KEEP = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


class Contender:
    """A side as a process. It has run once when the constructor returns.

    Attributes:
        first: seconds that building and the first run took, compilation included.
        held: bytes resident before anything is built, the side's own imports loaded.
        grown: bytes by which building and the first run raised the largest resident size.
        peak: largest resident size in bytes.
    """

    def __init__(
        self, side: Side, function: str, problem: Any, threads: int, *, exact_memory: bool = False
    ):
        self.name = side.name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, side, function, problem, threads), daemon=True
        )
        with _environment(threads, exact_memory=exact_memory):
            self._process.start()
        theirs.close()
        self.first, self.held, self.grown, self.peak = self._answer()

    def result(self) -> dict[str, np.ndarray]:
        """Return what one run computes."""
        return self._ask("result")

    def seconds(self) -> float:
        """Return the time of one run, the average of as many as take `SHORTEST`."""
        return self._ask("seconds")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, what: str) -> Any:
        self._pipe.send(what)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            answer = (
                f"The process ended with exit code {self._process.exitcode}; -9 usually means: "
                f"out of memory."
            )
        if isinstance(answer, str):
            self.__exit__(None, None, None)
            raise RuntimeError(f"{self.name} failed. {answer}")
        return answer


def _serve(pipe: Connection, side: Side, function: str, problem: Any, threads: int) -> None:
    """Build the side, run it once, then answer questions until killed."""
    try:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[:threads])
        # by now the environment says the same; torch alone would take all cores it can see
        importlib.import_module("torch").set_num_threads(threads)
        contender = getattr(importlib.import_module(f"contenders.{side.module}"), function)
        # before building: some keep in it what others make in a run, such as an optimizer's memory
        held = resident("VmRSS")
        start = time.perf_counter()
        run = contender(problem, **side.options)
        run()
        first = time.perf_counter() - start
        peak = resident("VmHWM")
        pipe.send((first, held, peak - held, peak))
        # on one core, what others do there meanwhile does not count
        clock = time.process_time if threads == 1 else time.perf_counter
        calls = 1
        while True:
            if pipe.recv() == "result":
                pipe.send({name: array(value) for name, value in run().items()})
                continue
            start = clock()
            for _ in range(calls):
                run()
            elapsed = clock() - start
            pipe.send(elapsed / calls)
            calls = max(calls, round(calls * SHORTEST / elapsed))
    except EOFError:
        pass
    except Exception:
        pipe.send(traceback.format_exc())


def array(value: Any) -> np.ndarray:
    """Return a tensor of any library as an array of its own."""
    return np.asarray(value.detach() if hasattr(value, "detach") else value).copy()


def resident(what: str) -> int:
    """Return this process's resident bytes now ("VmRSS") or at most so far ("VmHWM")."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what)
    )
    return 1024 * int(line.split()[1])


@contextmanager
def _environment(threads: int, *, exact_memory: bool) -> Iterator[None]:
    """While entered, processes that start are limited to `threads`.

    With `exact_memory` glibc gives large blocks back at once. Otherwise it keeps them all, as
    allocators for GPUs do: by itself it gives some back depending on the order in which they come
    and go, and to page them in again is up to a third of a run's time.
    """
    before = dict(os.environ)
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "JAX_PLATFORMS": "cpu",
    }
    if threads == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.environ |= (
        {"MALLOC_MMAP_THRESHOLD_": "65536"} if exact_memory else dict.fromkeys(KEEP, str(2**40))
    )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
