"""The memory that a function needs beyond what is there when it begins."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_memory(function: Callable[[], Any], device: torch.device) -> int:
    """Call the function and return the number of bytes by which it raised the memory at most.

    On CUDA what torch's allocator says. On the CPU, every block that torch's allocator hands out
    and takes back, from its profiler: temporaries inside operators count, memory of libraries (of
    oneDNN, of the BLAS) does not.

    Raises:
        ValueError: another kind of device, whose allocator cannot be asked.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        raise ValueError(
            f"`peak_memory` measures on the CPU and on CUDA, got a level on {device.type!r}. Move "
            f"the levels there."
        )
    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with _quiet():
        profiler.start()
    try:
        result = function()
        del result
    finally:
        with _quiet():
            profiler.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return _peak(json.loads(trace.read_text())["traceEvents"])


@contextmanager
def _quiet() -> Iterator[None]:
    """While entered, what the profiler's library writes to standard error is lost.

    Its own switch is an environment variable, read when torch is imported.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak(events: list[dict[str, Any]]) -> int:
    """Return the largest sum of blocks held at once, without blocks from before the trace."""
    held: dict[int, int] = {}
    now = most = 0
    for event in sorted(
        (event for event in events if event.get("name") == "[memory]"),
        key=lambda event: event["args"]["Ev Idx"],
    ):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            held[address] = size
            now += size
        else:
            now -= held.pop(address, 0)
        most = max(most, now)
    return most
